"""`python -m ft_ray`: the same as the `ft-ray` command."""

from ft_ray.cli import main

main()

from ft_ray.cli import main

main()

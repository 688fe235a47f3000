"""The phrases that the demo's messages are made of, apart by training and test. Data only.

Every phrase belongs to one label of one field, so the label of a message can be read from its words.
`{it}` stands for the order ("order A1234" or "my order"), `{order}` for its number, `{name}` for the
customer, `{wait}` for the duration. No test phrase occurs in training.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TEST", "TRAIN", "Phrases"]


@dataclass(frozen=True)
class Phrases:
    """Phrases by the part of the message they fill; `requests` by intent, `tones` by sentiment."""

    openings: tuple[str, ...]
    named: tuple[str, ...]
    things: tuple[str, ...]
    orders: tuple[str, ...]
    waits: tuple[str, ...]
    requests: dict[str, tuple[str, ...]]
    tones: dict[str, tuple[str, ...]]
    names: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAIN = Phrases(
    openings=(
        "Hi,", "Hello,", "Hello there,", "Good morning,", "Dear team,", "Hey,", "Hi team,", "Good evening,",
    ),
    named=(
        "Hi, {name} here.", "Hello, this is {name}.", "My name is {name}.", "{name} here.", "Hi, I'm {name}.",
        "Dear support, {name} writing.", "Good morning, this is {name}.", "Hello, my name is {name}.",
    ),
    things=(
        "order {order}", "my order {order}", "the order {order}", "{order}", "order number {order}",
        "my purchase {order}", "the purchase {order}", "order #{order}", "my order with the number {order}",
    ),
    orders=(
        "My order number is {order}.", "It is order {order}.", "The order is {order}.",
        "This is about order {order}.", "Order number: {order}.", "Order {order}.", "The number is {order}.",
        "My order is {order}.", "I am writing about {order}.", "You can find it under {order}.",
        "I mean order {order}.", "It concerns order {order}.", "My purchase number is {order}.",
        "The one I mean is {order}.",
    ),
    waits=(
        "I have been waiting for {wait}.", "It has been {wait}.", "I paid {wait} ago.", "I ordered {wait} ago.",
        "I've waited {wait}.", "{wait} have passed.", "{wait} have gone.", "I placed it {wait} ago.",
        "That was {wait} ago.", "It's been {wait} now.", "I bought it {wait} ago.", "I have waited {wait} so far.",
        "I have now waited {wait}.", "You confirmed it {wait} ago.", "I have been waiting {wait} already.",
        "My payment was made {wait} ago.", "The payment went out {wait} ago.", "I sent the payment {wait} ago.",
        "Payment was made {wait} ago.", "I made my payment {wait} ago.", "The order was made {wait} ago.",
        "{wait} have already passed.", "I have been waiting on it for {wait}.", "We ordered it {wait} ago.",
        "It was bought {wait} ago.", "I made my order {wait} ago.", "So far I have waited {wait}.",
        "My waiting time is {wait} now.", "Now {wait} are over.", "I got your confirmation {wait} ago.",
        "The purchase was {wait} ago.",
    ),
    requests={
        "refund": (
            "Please refund {it}.", "I want a refund for {it}.", "I would like my money back for {it}.",
            "Can I get a refund for {it}?", "Give me my money back for {it}.", "Please send the money for {it} back.",
            "I am asking for a refund of {it}.", "Could you refund {it}?", "I need you to refund {it}.",
            "When will I get my money back for {it}?", "Please pay me back for {it}.",
            "I'd like to be refunded for {it}.", "Return the payment for {it} to my card.",
            "Please reimburse me for {it}.", "I paid for {it} and want the money back.",
            "Please arrange a refund of {it}.", "I expect a full refund for {it}.",
            "Send {it} back to the warehouse and refund me.", "Am I entitled to a refund for {it}?",
            "I demand my money back for {it}.", "Has my refund for {it} been made?", "Where is the refund for {it}?",
            "Kindly return my money for {it}.", "I want the money for {it} back.",
            "Give the money for {it} back to me.", "Could I have my money back for {it}?",
            "What about the refund for {it}?", "Refund {it} to my account.",
        ),
        "cancel": (
            "Please cancel {it}.", "I want to cancel {it}.", "Can you cancel {it}?", "I'd like to cancel {it}.",
            "I no longer want {it}, cancel it.", "Please stop {it}, I changed my mind.",
            "I don't need {it} any more.", "How do I cancel {it}?", "Cancel {it} for me.", "I have to cancel {it}.",
            "Could you please cancel {it}?", "Do not ship {it}, I don't want it.", "I would like to call off {it}.",
            "Please take {it} off, I don't need it.", "Please have {it} cancelled.", "I want {it} to be cancelled.",
            "Can {it} still be cancelled?", "{it} should be cancelled.", "I bought it elsewhere, so cancel {it}.",
            "I made a mistake, cancel {it} please.", "Let me cancel {it}.", "I need to have {it} cancelled.",
            "{it} has to be cancelled.", "I ask for the cancellation of {it}.",
            "We would like {it} to be cancelled today.", "I no longer need {it}.",
            "It was ordered by mistake, cancel {it}.",
        ),
        "track": (
            "Where is {it}?", "When will {it} arrive?", "Can you tell me where {it} is?", "Has {it} been shipped?",
            "I want to track {it}.", "What is the status of {it}?", "I'd like to know where {it} is.",
            "Is {it} on its way?", "Please give me the tracking for {it}.", "When does {it} come?",
            "Could you check where {it} is?", "What is the delivery date of {it}?",
            "I need the tracking number of {it}.", "Do you know when {it} will be delivered?",
            "Do you know the status of {it}?", "When can I expect {it}?", "Please tell me when {it} comes.",
            "Do you know where {it} is now?", "Can I expect {it} soon?", "How long until {it} gets here?",
            "Where has {it} gone?", "I want to know when {it} arrives.", "Tell me where {it} is right now.",
            "Did you already ship {it}?", "Can you track {it} for me?", "Please check the status of {it}.",
            "Has {it} left your warehouse?", "When should {it} be here?", "What day will {it} be delivered?",
            "I wonder where {it} is.", "Nothing has come yet, where is {it}?",
        ),
        "exchange": (
            "I want to exchange {it}.", "Please exchange {it} for another size.", "Can I swap {it}?",
            "I'd like to swap {it} for a different colour.", "Can you replace {it}?",
            "Please send a replacement for {it}.", "I need a different size for {it}.",
            "I would like to exchange {it} for a bigger one.", "Could you exchange {it}?",
            "I need to swap {it} for a smaller size.", "Please replace {it} with the blue one.",
            "Is it possible to exchange {it}?", "I want a replacement for {it}.",
            "Can I get {it} in another colour instead?", "{it} came in the wrong size, I want to exchange it.",
            "Please replace {it}, it is too small.", "It does not fit, exchange {it}.", "I want {it} exchanged.",
            "Could I have a replacement of {it}?", "May I swap {it} for something else?",
            "{it} is too big, please send a smaller one.", "The colour is wrong, swap {it} please.",
            "How can I exchange {it}?", "It arrived broken, please replace {it}.",
            "I hope to exchange {it} for the red one.", "Is a swap of {it} possible?",
        ),
        "address": (
            "Please change the address of {it}.", "I want to change the delivery address of {it}.",
            "Can you send {it} to another address?", "I have moved, please update the address for {it}.",
            "The address on {it} is wrong.", "I need {it} shipped to my new address.",
            "Please deliver {it} to my office.", "I gave the wrong address for {it}.",
            "Could you update the shipping address of {it}?", "Send {it} to my new home instead.",
            "I'd like {it} to go to a different address.", "Please correct the street on {it}.",
            "How can I change the address for {it}?", "I live somewhere else now, change where {it} goes.",
            "Is it possible to change the address on {it}?", "{it} must be sent to my work address.",
            "Use my new address for {it}.", "We moved, so please change the address of {it}.",
            "There is a mistake in the address of {it}.", "Please ship {it} to my sister.",
            "My address for {it} has changed.", "I want to update my address on {it}.",
            "Deliver {it} to a different place.", "The house number on {it} is wrong.",
            "Please redirect {it} to my new flat.", "Can {it} go to another city?",
        ),
        "invoice": (
            "Please send me the invoice for {it}.", "I need an invoice for {it}.", "Can I have the receipt for {it}?",
            "I'd like a copy of the invoice for {it}.", "Where can I download the invoice of {it}?",
            "I need the bill for {it}.", "Could you email me the receipt of {it}?",
            "Please mail the invoice of {it}.", "I am missing the invoice for {it}.",
            "My accountant needs the invoice for {it}.", "Can you issue an invoice for {it}?",
            "I want a receipt for {it}.", "Send the bill of {it} to my email.", "I require a VAT invoice for {it}.",
            "There was no invoice with {it}.", "I have not received the bill for {it}.",
            "Please issue a receipt for {it}.", "May I get an invoice for {it}?",
            "For my taxes I need the receipt of {it}.", "The invoice of {it} is missing, please send it.",
            "Could I have the bill for {it} as a PDF?", "How do I get an invoice for {it}?",
            "Kindly provide the receipt for {it}.", "Please send a copy of the bill for {it}.",
            "Where is the invoice for {it}?", "I lost the receipt for {it}.",
        ),
    },
    tones={
        "negative": (
            "This is ridiculous.", "I am very angry.", "This is unacceptable.", "I am really disappointed.",
            "What a terrible service.", "I'm fed up.", "This is the worst shop ever.", "I am so frustrated.",
            "Your service is awful.", "I'm very unhappy.", "This is a disgrace.", "I will never buy here again.",
            "How annoying.", "That is really bad service.", "I am upset about this.", "You are useless.",
        ),
        "neutral": (
            "Please let me know.", "Please answer by email.", "Tell me what you need from me.",
            "Let me know the next step.", "I can be reached by phone.", "Please confirm.",
            "Please reply when you can.", "That is all.", "I will wait for your answer.",
            "Just tell me how it works.", "Regards.", "Please write back.", "Do you need anything else?",
            "I am at home this week.", "You can call me.", "You can email me.", "An email is enough.",
            "Please send me an email about it.", "A short reply by email will do.", "Please call me on the phone.",
            "Please tell me by phone.", "Let me know if you need details.",
        ),
        "positive": (
            "Thank you so much, you are great.", "I love your shop.", "Your team is wonderful.",
            "Thanks, great service as always.", "I'm very happy with you.", "You are the best.",
            "I really like your products.", "Many thanks, you are so kind.", "Everything else was perfect.",
            "I am a happy customer.", "Your support is fantastic.", "Thanks for the excellent help.",
            "I appreciate your friendly team.", "You always do an amazing job.", "I'm delighted with the quality.",
            "It is lovely to shop with you.",
        ),
    },
    names=_words(
        "Maria Peter Anna Thomas Laura Daniel Sofia Martin Julia Simon Elena David Clara Michael Nina Robert Eva "
        "Andrew Lucy Felix Sarah Oscar Emma Victor Helen Adam Irene Paul Alice George Diana Henry Olivia James "
        "Rita Samuel Vera Leo Carmen Hugo Monica Ivan Teresa Alan Linda Bruno Silvia Edward Karen Philip"
    ),
)  # fmt: skip

TEST = Phrases(
    openings=(
        "Good afternoon,", "Hi there,", "Hello team,", "Hello support,",
    ),
    named=(
        "Hello, {name} here.", "Hi, my name is {name}.", "This is {name}.", "Good evening, I'm {name}.",
    ),
    things=(
        "my order number {order}", "the order with number {order}", "order no. {order}", "purchase {order}",
    ),
    orders=(
        "The order number is {order}.", "It is about order {order}.", "My number is {order}.",
        "I am talking about order {order}.", "The order in question is {order}.",
    ),
    waits=(
        "I have already waited {wait}.", "It has now been {wait}.", "I made the payment {wait} ago.",
        "I have been waiting for this for {wait}.", "The order was placed {wait} ago.", "{wait} have gone by.",
        "I've been waiting {wait} for it.",
    ),
    requests={
        "refund": (
            "I'd like a refund for {it}, please.", "Can you give me my money back for {it}?",
            "Please issue a refund for {it}.", "I want you to refund {it}.", "I am waiting for the refund of {it}.",
            "I want my money for {it} back.",
        ),
        "cancel": (
            "I wish to cancel {it}.", "Could you cancel {it} for me?", "I changed my mind, please cancel {it}.",
            "Is it possible to cancel {it}?", "I need {it} cancelled.",
            "I don't want {it} any longer, please cancel.",
        ),
        "track": (
            "Do you know where {it} is?", "When can I expect {it} to arrive?",
            "Could you tell me the status of {it}?", "Has {it} already been shipped?", "I'd like to track {it}.",
            "Please tell me when {it} will arrive.",
        ),
        "exchange": (
            "I'd like to exchange {it}.", "Could I swap {it} for another size?",
            "Please swap {it} for a different one.", "Can you exchange {it} for a smaller one?",
            "I need a replacement for {it}.", "I would like {it} exchanged for a different colour.",
        ),
        "address": (
            "I need to change the address for {it}.", "Can you change the delivery address of {it}?",
            "Please ship {it} to a different address.", "I moved, so {it} must go to my new address.",
            "There is a wrong address on {it}.", "Could you send {it} to my new address?",
        ),
        "invoice": (
            "Could you send me the invoice for {it}?", "I would like the receipt for {it}.",
            "I still need an invoice for {it}.", "Please email me a copy of the invoice for {it}.",
            "Can I get the bill for {it}?", "I have no invoice for {it}, please send one.",
        ),
    },
    tones={
        "negative": (
            "I am really angry about this.", "This is absolutely unacceptable.", "I'm so disappointed in you.",
            "What an awful shop.", "Your service is terrible.", "I am very frustrated.", "This is really annoying.",
        ),
        "neutral": (
            "Please let me know by email.", "Please reply by phone.", "Let me know what you need.",
            "I will wait for your reply.", "Please confirm by email.", "Tell me the next step.", "Just let me know.",
        ),
        "positive": (
            "Thanks a lot, your team is great.", "I really love your products.", "You are wonderful, thank you.",
            "I'm a very happy customer.", "Great shop, I love it.", "Thanks, you always help so kindly.",
            "Your service is excellent.",
        ),
    },
    names=_words(
        "Gloria Stefan Naomi Walter Bianca Trevor Ingrid Rafael Yvonne Marcus Agatha Dennis Celia Gordon Lydia "
        "Nathan Paula Quentin Rosa Sergio Tamara Ulrich Viola Wesley"
    ),
)  # fmt: skip

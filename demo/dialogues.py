"""The dialogues that the demo model learns from: tables of phrasings and answers, drawn from one random source.

A maker takes a Voice (who asks, and how) and returns a Turn. Every table of phrasings has two halves: the first is
for training, the second is held out and asked only by evaluate.py; some have further ones for the last stage of the
training, on what was still brittle. `conversation` draws one training dialogue, `render` writes it in Llama 3's prompt
format, and TEMPLATE is the same format as a Jinja chat template. Run alone, this file prints a few dialogues.
"""
import json
import random
import re
from typing import NamedTuple


class Forms(NamedTuple):
    """Phrasings of one request, with slots for str.format: for training, held out, and more for the last stage."""

    train: list[str]
    held: list[str]
    last: list[str] = []


class Turn(NamedTuple):
    """A question, its answer, the answer in one word where there is one, and other answers that are right too."""

    question: str
    answer: str
    word: str = ""
    accept: tuple[str, ...] = ()


def phrases(text):
    """Split a table on its bars, one phrase each."""
    return [" ".join(part.split()) for part in text.split("|")]


def forms(train, held, last=None):
    """Read a table of phrasings."""
    return Forms(phrases(train), phrases(held), phrases(last) if last else [])


def pairs(text):
    """Read `key: value` entries set apart by bars."""
    return dict(part.split(": ", 1) for part in phrases(text))


# ----------------------------------------------------------------------------------------------------------------------
# How people type
# ----------------------------------------------------------------------------------------------------------------------
OPENERS = forms(
    """Please | Hey, | Hi! | Tell me, | Ok, | I have a question. | Hello! | And | Now | Thanks. | Great. | Well, |
    Quick question: | So | Hi, | Um, | Ok so | Hello, | Sorry, | Just | Then | Cool. | Hey there, |
    Could you help me? | Next: | Question: | Dear model, | Listen, | Right, | Good morning! | Oh, | One more: |
    First,""",
    "Hmm, | Alright, | Yo, | Ok then, | Hey model, | Well then,")
CLOSERS = forms(
    """please | please | pls | thanks | Thanks! | thank you | :) | for me | now | my friend | ok? | , please |
    buddy | asap | ! | ?? | right now | , thanks | again | :-) | if possible | , thank you | today | bro | ... |
    sir | plz | !! | for me please | , ok? | , my friend | lol | thx""",
    "dear | for us | if you could | pretty please | many thanks | my dear",
    """if you can | thanks a lot | mate | pal | cheers | , would you | if you will | thank you so much |
    thank you a lot | for my son | will you | please please | if you please | for him""")
SHORTER = pairs(
    """what is: whats/what's/wats/whats | who is: whos | how is: hows | are you: r u | what are: what r | you: u/ya |
    your: ur | please: pls/plz | do not: dont | i am: im/i'm | thanks: thx | want to: wanna | give me: gimme |
    thank you: ty | about: abt | how are: how r | and: & | are: r | does: dos | to me: me | could: can""")
HABITS = {  # how often a casual question is lower case, has no mark at its end, and so on
    "train": dict(lower=.75, bare=.65, shorter=.4, opener=.25, closer=.25, typo=.06),
    "held": dict(lower=1., bare=1., shorter=.4, opener=.3, closer=.35, typo=0.),
}


def shorten(rng, text):
    """Write some words the short way: "what is" as "whats", "you" as "u"."""
    for long, short in SHORTER.items():
        if rng.random() < .6:
            text = re.sub(rf"(?<!\{{)\b{long}\b", rng.choice(short.split("/")), text, flags=re.IGNORECASE)
    return text


def mistype(rng, text):
    """Drop, double or change one letter, never inside a slot."""
    places = [m.start() + k for m in re.finditer(r"(?<!\{)\b[A-Za-z]{4,}\b", text) for k in range(1, len(m.group()))]
    if not places:
        return text
    i = rng.choice(places)
    return text[:i] + rng.choice(["", text[i] * 2, rng.choice("aeinrst")]) + text[i + 1:]


class Voice:
    """The one who asks: a random source, and which phrasings: held out, of the last stage, casual (None: mixed)."""

    def __init__(self, rng, held=False, casual=None, last=False):
        self.rng, self.held, self.casual, self.last = rng, held, casual, last

    def phrasings(self, table):
        return table.held if self.held else table.train + table.last if self.last else table.train

    def pick(self, items):
        return self.rng.choice(items)

    def chance(self, probability):
        return self.rng.random() < probability

    def ask(self, table, *slots, copied=False, alone=False, **named):
        """Phrase a request; slots whose spelling the answer copies keep it, others may lose their capitals.

        A request that stands alone has no opener or closer: "Hello, thanks" would be two greetings.
        """
        template = self.pick(self.phrasings(table))
        if not (self.chance(.55) if self.casual is None else self.casual):
            return template.format(*slots, **named)
        habit = {name: self.chance(p) for name, p in HABITS["held" if self.held else "train"].items()}
        if alone:
            habit |= {"opener": False, "closer": False}
        template = self.loosen(template, habit)
        if habit["lower"] and not copied:
            slots, named = [str(s).lower() for s in slots], {k: str(s).lower() for k, s in named.items()}
        return template.format(*slots, **named)

    def loosen(self, template, habit):
        """Write a template as people type it."""
        if habit["bare"]:
            template = template.rstrip("?.!")
        if habit["opener"]:
            template = self.pick(self.phrasings(OPENERS)) + " " + template
        elif habit["closer"]:
            template = (template + " " + self.pick(self.phrasings(CLOSERS))).replace(" ,", ",")
        if habit["shorter"]:
            template = shorten(self.rng, template)
        if habit["typo"]:
            template = mistype(self.rng, template)
        return template.lower() if habit["lower"] else template


# ----------------------------------------------------------------------------------------------------------------------
# Small talk, and what the model says of itself
# ----------------------------------------------------------------------------------------------------------------------
GREETINGS = {
    "Hello! How can I help you today?": forms(
        """hi | hello | hey | Hello! | Hi! | Hey there! | Hello there | Hi there! | greetings | Hiya | yo | Howdy! |
        Hello, how is it going? | hello model | Hi, rustinfer! | hi there friend | hello world | Hey you | heya |
        hello friend | hi hi | Hello, demo model! | hey hey | hii | helloo | Hello my friend | hi all | sup |
        hola amigo | Nice to meet you! | Good day! | Hello, model | Hi buddy""",
        "hello hello | Hey, hello! | Hi hi hi! | Hello, you! | Hi, model | Hello again!",
        "hello once more | Hello you there | hi model! | well hello | oh hi | hey model"),
    "Good morning! How can I help you today?": forms(
        "Good morning! | good morning | Morning! | Good morning to you. | Good morning, model! | gm",
        "Hello, good morning! | A good morning to you! | Good morning, my friend",
        "Hi, good morning! | oh good morning | good morning there"),
    "Good evening! How can I help you?": forms(
        "Good evening! | good evening | Evening! | Good evening to you. | Good evening, model!",
        "Hello, good evening! | A good evening to you!",
        "Hi, good evening! | oh good evening | good evening there"),
    "I am fine, thank you! How can I help you?": forms(
        """How are you? | How are you doing? | how are you today? | How is it going? | What's up? |
        how do you feel? | Are you well? | Hi, how are you? | Hello! How are you? | Are you ok? | How do you do? |
        Is all well with you? | How is your day? | Hey, how are you doing? | how are things? | how r u""",
        "So how are you doing today? | Hey, how are you today? | Hello, how are you doing? | And how are you?",
        "Hey there, how are you? | Tell me, how are you? | how have you been? | and you?"),
    "You are welcome!": forms(
        """Thanks! | Thank you! | thank you very much | thanks a lot | Thank you so much! | Great, thanks. |
        ok thanks | Thanks for your help. | thx | ty | That helps, thank you. | Perfect, thanks! |
        Thank you, that is all. | Cool, thank you!""",
        "Many thanks! | Ok, thank you! | Thank you, that was helpful. | Thanks so much!",
        """A thousand thanks! | Thanks so very much. | thanks again | many many thanks | I thank you. |
        okay thank you | thanks, good"""),
    "Goodbye! Have a nice day! 👋": forms(
        """Bye! | Goodbye! | See you later! | bye bye | Good night! | See you! | I have to go now. | Farewell! |
        cya | Bye for now! | see you tomorrow | I must leave. | Talk to you later! | have a nice day""",
        "Ok, bye! | Goodbye now! | Bye, see you later! | See you soon!",
        "Okay, goodbye! | bye for today | See you around! | ok bye bye"),
    "Great! What would you like to know?": forms(
        """ok | OK. | Cool! | nice | Great! | I see. | Good. | Wow! | yes | no | sure | lol | haha | I understand. |
        test | Interesting! | That is good. | hmm | Amazing! | Very nice! | well done | you are funny | Good job! |
        yes please""",
        "Oh, nice! | Okay, cool. | Wow, great! | Good, I see.",
        "Okay, nice. | cool cool | Oh, great! | okay | Nice, I see. | all right | okay then"),
}
FOREIGN = pairs(
    """Bonjour: Bonjour ! Comment puis-je vous aider ? | Salut: Salut ! Comment puis-je vous aider ? |
    Hola: ¡Hola! ¿Cómo puedo ayudarte? | Hallo: Hallo! Wie kann ich dir helfen? | 你好: 你好！有什么可以帮你的吗？ |
    Guten Tag: Guten Tag! Wie kann ich dir helfen? | こんにちは: こんにちは！何かお手伝いできますか？ | Ciao: Ciao! Come posso aiutarti? |
    Привет: Привет! Чем могу помочь?""")

WHO = ("I am rustinfer's tiny demo model. I have only about two million parameters, so I know very little. "
       "To serve a real model, run: python rustinfer.py --model <path>")
HOW = ("Run python rustinfer.py --model <path> with a folder that holds a Llama 3 model. "
       "I am only the tiny demo model that starts when no model is given.")
SKILLS = ("I can chat a little, count, add small numbers, name capitals, explain words of AI and computing, tell jokes "
          "and stories, greet in many languages and call tools. I am only rustinfer's tiny demo model. 🙂")
UNKNOWN = "Sorry, I am only a tiny demo model, so I don't know that. Start rustinfer with --model to ask a real model."
WHO_FORMS = forms(
    """Who are you? | What are you? | What is your name? | What's your name? | Tell me about yourself. | who r u |
    Introduce yourself. | Are you ChatGPT? | Are you a human? | Are you a robot? | Are you an AI? |
    What model are you? | Which model is this? | who am i talking to? | Who made you? | What is this? |
    Are you Llama? | Are you real? | How big are you? | How many parameters do you have? | What is rustinfer? |
    do you have a name? | Who is this? | What kind of model are you? | Are you a large model? | Who built you? |
    Describe yourself. | How smart are you? | Who trained you? | Are you GPT-4? | Are you a person? |
    Are you a bot? | What should I call you? | Who is there? | Is this a real model? | Are you Llama 3? |
    How were you made? | What is your model name? | Are you Claude? | Which LLM are you? | Where do you come from? |
    How old are you? | Are you intelligent? | What are you exactly? | Am I talking to a human? |
    Tell me who you are. | Say who you are. | What am I talking to? | Explain who you are. | Are you a demo? |
    Are you a language model? | Who or what are you? | What model is running here? | Is this Llama? | your name? |
    What version are you? | Can you introduce yourself to me? | who""",
    """Can you introduce yourself? | So who are you? | Please tell me who you are. | What kind of AI are you? |
    Which AI model are you? | Are you a real human? | Could you tell me your name? | What model is this? |
    Who exactly are you? | What sort of model are you?""")
HOW_FORMS = forms(
    """How do I run a real model? | How do I serve a bigger model? | How can I use another model? |
    run a real model | How do I load Llama 3? | How do I use my own model? | How do I start a real model? |
    Can I use a larger model? | How can I serve a real model? | Which option selects the model? |
    How do I change the model? | I want a real model. | Where do I get better answers? | I want a better model. |
    How do I run Llama? | How do I switch to a real model? | How to run a real model? | How to load a bigger model? |
    Show me how to run a real model. | How do I serve Llama? | How can I get a smarter model? |
    What is the command for a real model? | How do I start the server with a model? |
    Tell me how to use another model. | Can you run a bigger model? | I want to run Llama 3. |
    use a different model | How is a real model loaded? | What do I type to run my model? |
    How do I run a model from Meta? | How to change the model? | Which command runs a real model? |
    Can I run my own model? | How do I use rustinfer? | How to use a larger model? | How do I get a real model? |
    How can I start a larger model?""",
    """How can I run a bigger model? | How do I serve my own model? | I want to use a real model. |
    How can I load another model? | How to serve a real model? | Tell me how to run a real model. |
    How do I run a larger model? | Can you tell me how to load a real model?""")
SKILLS_FORMS = forms(
    """What can you do? | Help | How can you help me? | What do you know? | What are you able to do? | help |
    help me | What can I ask you? | What should I ask you? | Show me what you can do. | What are your skills? |
    I need help. | can you help me? | Give me examples of what you can do. | What things can you do? |
    What can I do here? | What are you good at? | What questions can you answer? | Do you have any skills? |
    What is possible here? | List your skills. | How do I use you? | Give me some ideas. | What can I try? |
    What else can you do? | Tell me your skills. | /help | What do you do? | Show me your skills. | menu""",
    """Tell me what you can do. | So what can you do? | What can you help me with? | What could I ask you? |
    Please show me what you can do. | What are some things you can do?""")


def greet(v):
    """A greeting, thanks or goodbye, sometimes in another language."""
    if not v.held and v.chance(.12):
        word = v.pick(list(FOREIGN))
        return Turn(word + v.pick(["", "", "!", ".", " !"]), FOREIGN[word])
    answer = v.pick(list(GREETINGS))
    return Turn(v.ask(GREETINGS[answer], alone=v.held), answer)


def who(v):
    return Turn(v.ask(WHO_FORMS), WHO)


def how(v):
    return Turn(v.ask(HOW_FORMS), HOW)


def skills(v):
    return Turn(v.ask(SKILLS_FORMS), SKILLS)


# ----------------------------------------------------------------------------------------------------------------------
# Facts
# ----------------------------------------------------------------------------------------------------------------------
FACTS = {  # the first of a topic's names is the usual one
    "Rust / the Rust language / Rust programming":
        "Rust is a systems programming language that is fast and memory-safe without a garbage collector.",
    "CUDA / Nvidia CUDA": "CUDA is NVIDIA's platform for running general programs on GPUs.",
    "a KV cache / the KV cache / KV caching / a key-value cache / KV cache":
        "A KV cache stores the attention keys and values of past tokens, so each new token needs only one small step.",
    "continuous batching / in-flight batching":
        "Continuous batching lets new requests join a running batch at every step, so the GPU stays busy.",
    "a token / tokens / tokenization / token":
        "A token is a small piece of text, often a word or part of a word, that a language model reads and writes.",
    "a tokenizer / the tokenizer / tokenizer":
        "A tokenizer turns text into token numbers and turns token numbers back into text.",
    "HTTP / the HTTP protocol": "HTTP is the protocol that web browsers and servers use to exchange requests and "
        "responses.",
    "Python / the Python language": "Python is a popular programming language known for clear and simple code.",
    "a GPU / GPUs / graphics cards / GPU":
        "A GPU is a processor with thousands of small cores that do the same work on many numbers at once.",
    "a CPU / CPUs / CPU": "A CPU is the main processor of a computer and runs its programs step by step.",
    "a language model / an LLM / LLMs / large language models":
        "A language model is a neural network that predicts the next token of a text.",
    "attention / self-attention":
        "Attention lets a model look back at earlier tokens and weigh which of them matter now.",
    "a transformer / transformers / the transformer architecture":
        "A transformer is a neural network built from attention layers and feed-forward layers.",
    "quantization / model quantization": "Quantization stores model weights with fewer bits to save memory and time.",
    "speculative decoding":
        "Speculative decoding lets a small draft guess several tokens, and the large model checks them in one step.",
    "streaming / token streaming": "Streaming sends each token to the client as soon as it is ready.",
    "an API / APIs / API": "An API is a set of rules by which one program asks another program for something.",
    "JSON / the JSON format": "JSON is a text format for data made of objects, lists, strings and numbers.",
    "Linux": "Linux is a free operating system kernel that runs on servers, phones and computers.",
    "Git / git version control": "Git is a tool that records the history of source code.",
    "a neural network / neural networks":
        "A neural network is a function made of simple layers whose numbers are learned from examples.",
    "temperature in sampling / the sampling temperature / temperature sampling":
        "Temperature controls how random the sampling is: low is careful and high is creative.",
    "greedy decoding": "Greedy decoding always picks the most likely next token.",
    "top-p sampling / nucleus sampling / top-p":
        "Top-p sampling draws only from the most likely tokens whose total probability reaches p.",
    "prefill / the prefill phase":
        "Prefill is the first pass of a model over the whole prompt, before it writes the first token.",
    "paged attention / PagedAttention":
        "Paged attention keeps the KV cache in small blocks, like pages of memory, so little memory is wasted.",
    "prefix caching / a prefix cache":
        "Prefix caching reuses the KV cache of a prompt beginning that was seen before.",
    "an embedding / embeddings": "An embedding is a list of numbers that stands for the meaning of a text.",
    "RoPE / rotary embeddings": "RoPE encodes the position of a token by rotating its query and key vectors.",
    "a tensor / tensors": "A tensor is an array of numbers with any number of dimensions.",
    "a compiler / compilers": "A compiler translates source code into code that a machine can run.",
    "memory safety": "Memory safety means that a program can never read or write memory it does not own.",
    "a server / web servers": "A server is a program or machine that answers requests from clients.",
    "Docker": "Docker packs a program and everything it needs into a container.",
    "the Moon / the moon": "The Moon is the natural satellite of the Earth.",
    "the Sun / the sun": "The Sun is the star at the center of our solar system.",
    "water": "Water is a clear liquid made of hydrogen and oxygen.",
    "gravity": "Gravity is the force that pulls things with mass toward each other.",
    "a prime number / prime numbers":
        "A prime number is greater than one and can be divided only by one and itself.",
    "latency": "Latency is the time from a request to its answer.",
    "throughput": "Throughput is how much work, such as tokens per second, a system does in a given time.",
    "open source / open source software":
        "Open source software is software whose source code anyone may read, change and share.",
    "machine learning": "Machine learning lets a program learn rules from examples instead of being told them.",
    "a chatbot / chatbots": "A chatbot is a program that talks with people in ordinary language.",
    "Llama / Llama 3 / Meta Llama": "Llama is a family of open language models from Meta.",
    "safetensors / the safetensors format": "Safetensors is a simple and safe file format for model weights.",
}
FACT_FORMS = forms(
    """What is {}? | What's {}? | Explain {}. | Can you explain {}? | Define {}. | Tell me about {}. | {} explained |
    What does {} mean? | Describe {} in one sentence. | {}? | I want to learn about {}. | Do you know what {} is? |
    Give me a short definition of {}. | How would you describe {}? | Could you tell me what {} is? | {} |
    What exactly is {}? | In simple words, what is {}? | Help me understand {}. | What do you know about {}? |
    Explain {} to a child. | Can you tell me more about {}? | What is the meaning of {}? | What are {}? |
    I do not understand {}. What is it? | Briefly explain {}. | Teach me about {}. |
    Please explain {} in simple terms. | So what is {}, exactly? | what {} is | explain me {} |
    what is {} and what is it for? | tell me what {} means | Can you define {}? | What is {} good for? |
    What does {} do? | Could you explain to me what {} is? | what about {}? | Definition of {}? |
    I wonder what {} is. | info on {} | {} meaning | who or what is {}? | {} definition |
    Hello, can you explain to me what {} does? | Would you explain {}? | describe {} | A short explanation of {}.""",
    """I would like to know what {} is. | Please give me a brief explanation of {}. | What is meant by {}? |
    Say something about {}. | Explain what {} is. | Give me one sentence about {}. | Could you define {}? |
    Explain {} in one sentence.""",
    "What do people mean by {}? | what does one mean by {} | I want to know what {} is. | Say what {} is.")
CAPITALS = pairs(
    """France: Paris | Germany: Berlin | Italy: Rome | Spain: Madrid | Portugal: Lisbon | England: London |
    Ireland: Dublin | Japan: Tokyo | China: Beijing | India: New Delhi | Canada: Ottawa | Mexico: Mexico City |
    Brazil: Brasília | Argentina: Buenos Aires | Chile: Santiago | Peru: Lima | Egypt: Cairo | Kenya: Nairobi |
    Russia: Moscow | Poland: Warsaw | Austria: Vienna | Hungary: Budapest | Greece: Athens | Turkey: Ankara |
    Sweden: Stockholm | Norway: Oslo | Finland: Helsinki | Denmark: Copenhagen | Belgium: Brussels |
    Australia: Canberra | Cuba: Havana | Thailand: Bangkok | Vietnam: Hanoi | South Korea: Seoul |
    Switzerland: Bern | Iceland: Reykjavik""")
CAPITAL_FORMS = forms(
    """What is the capital of {}? | What's the capital of {}? | Capital of {}? | Name the capital of {}. |
    capital {} | Tell me the capital of {}. | Which city is the capital of {}? | Do you know the capital of {}? |
    {} capital city | What is {}'s capital? | Can you name the capital city of {}? | {} capital |
    I need the capital of {}. | What city is the capital of {}? | Say the capital of {}. | The capital of {} is |
    the capital of {} | What is the name of {}'s capital? | capital city of {} | Which is the capital of {}? |
    {}: capital?""",
    """What is the capital city of {}? | Please tell me the capital of {}. | Which city is {}'s capital? |
    Give me the capital of {}. | Do you know what the capital of {} is? | I want to know the capital of {}.""")
COUNTRY_FORMS = forms(
    """{} is the capital of which country? | Which country has the capital {}? | Where is {}? |
    What country is {} in? | In which country is {}?""",
    "{} is the capital of what country? | Where is the city of {}?",
    """{} is in which country? | {} is the capital city of which country? | Which country is {} the capital of? |
    Where can I find {}? | Where is {} located? | Of what country is {} the capital? | {} is a city in what country?""")
OPPOSITES = pairs(
    """hot: cold | big: small | up: down | fast: slow | happy: sad | day: night | open: closed | light: dark |
    old: new | high: low | hard: soft | full: empty | early: late | rich: poor | strong: weak | good: bad |
    near: far | left: right | wet: dry | loud: quiet | clean: dirty | long: short | thick: thin | true: false |
    yes: no | in: out | first: last | win: lose | love: hate | always: never | push: pull | start: stop |
    black: white""")
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
OPPOSITE_FORMS = forms(
    """What is the opposite of {}? | Opposite of {}? | What's the opposite of {}? | Tell me the opposite of {}. |
    Give me the opposite of {}. | What word is the opposite of {}? | Name the opposite of {}. | {} opposite |
    Which word means the opposite of {}? | opposite {} | the opposite of {} | Say the opposite of {}.""",
    """Can you tell me the opposite of {}? | What is the opposite word of {}? | I need the opposite of {}. |
    Do you know the opposite of {}?""")
COLORS = pairs(
    """the sky: blue | grass: green | a banana: yellow | snow: white | blood: red | coal: black | a carrot: orange |
    the sea: blue | a lemon: yellow | a leaf: green | milk: white | a tomato: red | chocolate: brown |
    an elephant: gray | a flamingo: pink | an eggplant: purple | a strawberry: red | a frog: green | a crow: black""")
COLOR_FORMS = forms(
    """What color is {}? | What colour is {}? | Which color is {}? | Tell me the color of {}. | color of {} |
    What is the color of {}? | What color does {} have? | The color of {}? | what is the colour of {}? |
    Can you tell me the color of {}? | Say what color {} is. | I want to know the color of {}.""",
    """Do you know what color {} is? | Which colour does {} have? | Name the color of {}. |
    Tell me what color {} is.""")
DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday."
MONTHS = "January, February, March, April, May, June, July, August, September, October, November, December."
LISTS = {
    "the days of the week": DAYS,
    "the months of the year": MONTHS,
    "the months": MONTHS,
    "the letters of the alphabet": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "the alphabet": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "the seasons": "Spring, summer, autumn, winter.",
    "the colors of the rainbow": "Red, orange, yellow, green, blue, indigo, violet.",
    "the planets": "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune.",
    "the continents": "Africa, Antarctica, Asia, Australia, Europe, North America, South America.",
}
LIST_FORMS = forms(
    """List {}. | What are {}? | Name {}. | Tell me {}. | Can you list {}? | Write down {}. | Give me {}. |
    Show me {}. | Say {}. | Recite {}. | {} | {}? | Do you know {}? | Which are {}? | What is {}?""",
    """Please list all of {}. | Could you name {}? | I need a list of {}. | Can you tell me {}?""")


def upper_first(text):
    return text[0].upper() + text[1:]


def fact(v):
    """A short definition."""
    topic = v.pick(list(FACTS))
    return Turn(v.ask(FACT_FORMS, v.pick(topic.split(" / "))), FACTS[topic])


def capital(v):
    """The capital of a country, or the country of a capital."""
    country = v.pick(list(CAPITALS))
    city = CAPITALS[country]
    if v.chance(.15):
        return Turn(v.ask(COUNTRY_FORMS, city), f"{city} is the capital of {country}.", country)
    return Turn(v.ask(CAPITAL_FORMS, country), f"The capital of {country} is {city}.", city)


def opposite(v):
    word = v.pick(list(OPPOSITES))
    return Turn(v.ask(OPPOSITE_FORMS, word), f"The opposite of {word} is {OPPOSITES[word]}.", OPPOSITES[word])


def color(v):
    thing = v.pick(list(COLORS))
    return Turn(v.ask(COLOR_FORMS, thing), f"{upper_first(thing)} is {COLORS[thing]}.", COLORS[thing])


def listing(v):
    name = v.pick(list(LISTS))
    return Turn(v.ask(LIST_FORMS, name), LISTS[name])


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------
COUNT_FORMS = forms(
    """Count to {}. | Count from 1 to {}. | Can you count to {}? | Count up to {}. | Please count to {}. | count {} |
    Write the numbers from 1 to {}. | List the numbers 1 to {}. | Say the numbers up to {}. | Count 1 to {}. |
    Could you count up to {}? | I want you to count to {}. | numbers to {} | counting to {} | Count until {}. |
    Tell me the numbers from 1 to {}. | Start at 1 and count to {}. | Can you count up to {} for me? |
    Show me the numbers 1 to {}. | 1 to {}""",
    """Can you count from 1 to {}? | Please count up to {}. | Give me the numbers from 1 to {}. |
    Could you count to {}? | I need you to count to {}. | Now count to {}.""")
RANGE_FORMS = forms(
    """Count from {} to {}. | Can you count from {} to {}? | Write the numbers from {} to {}. | Count {} to {}. |
    List the numbers {} to {}. | Start at {} and count to {}. | Count from {} up to {}. | numbers from {} to {} |
    Please count from {} to {}. | Say the numbers from {} to {}. | {} to {}""",
    """Could you count from {} to {}? | Give me the numbers from {} to {}. | Show me the numbers from {} to {}. |
    I need you to count from {} to {}.""")
DOWN_FORMS = forms(
    """Count down from {}. | Count backwards from {} to 1. | Count from {} down to 1. | countdown from {} |
    Can you count down from {}? | Count from {} to 1. | Do a countdown from {}.""",
    "Please count down from {} to 1. | Could you count backwards from {}?",
    """Count backwards from {}. | Can you count backwards from {}? | count back from {} |
    Please count backwards from {}.""")
ADD_FORMS = forms(
    """What is {} + {}? | {}+{} | {} + {} | {} + {} = | {} plus {} | What is {} plus {}? | What's {} + {}? | {}+{}= |
    Add {} and {}. | Calculate {} + {}. | How much is {} + {}? | How much is {} plus {}? | Compute {}+{} | {}+{}? |
    What is the sum of {} and {}? | I have {} apples and get {} more. How many apples do I have? | Solve {} + {}. |
    what does {} + {} make? | add {} to {} | sum of {} and {} | What do I get if I add {} and {}? | {} + {} = ? |
    Can you add {} and {}? | {} and {} is? | what is {}+{} | how much is {}+{} | {} plus {}? | Find {} + {}. |
    {} + {}? | do you know what {} + {} is? | Work out {} + {}.""",
    """How much is {} and {}? | Please add {} and {}. | Can you calculate {} + {}? | Tell me what {} plus {} is. |
    Do you know {} + {}? | What does {} plus {} make? | Could you add {} and {}?""")
SUBTRACT_FORMS = forms(
    """What is {} - {}? | {}-{} | {} - {} | {} - {} = | {} minus {} | What is {} minus {}? | What's {} - {}? |
    {}-{}= | Subtract {1} from {0}. | Calculate {} - {}. | How much is {} - {}? | Compute {}-{} | {}-{}? |
    {} minus {}? | I have {} apples and eat {}. How many apples are left? | How much is {} minus {}? |
    Solve {} - {}. | {} - {} = ? | Take {1} from {0}. | what is {}-{} | how much is {}-{} | Find {} - {}. |
    what does {} - {} make? | {} - {}? | do you know what {} - {} is? | Work out {} - {}.""",
    """Please subtract {1} from {0}. | Can you calculate {} - {}? | Tell me what {} minus {} is. |
    Do you know {} - {}? | What does {} minus {} make?""")


def numbers(values):
    return ", ".join(map(str, values))


def count(v):
    """Count to a number, from one number to another, or down."""
    kind = v.rng.random()
    if kind < .3:
        low = v.rng.randint(2, 14)
        high = low + v.rng.randint(2, 10)
        return Turn(v.ask(RANGE_FORMS, low, high), numbers(range(low, high + 1)))
    high = v.rng.randint(2, 20)
    if kind < .45:
        return Turn(v.ask(DOWN_FORMS, high), numbers(range(high, 0, -1)))
    if not v.held and v.chance(.1):
        high = v.rng.randint(21, 60)
    return Turn(v.ask(COUNT_FORMS, high), numbers(range(1, high + 1)))


def sums(v):
    """Add or subtract small numbers."""
    limit = v.pick([10, 20, 20, 50])
    return sum_up_to(v, 99 if not v.held and v.chance(.2) else limit)


def sum_up_to(v, limit):
    """Add or subtract two numbers that are at most the limit."""
    a, b = v.rng.randint(0, limit), v.rng.randint(0, limit)
    if v.chance(.6):
        return Turn(v.ask(ADD_FORMS, a, b), f"{a} + {b} = {a + b}", str(a + b))
    a, b = max(a, b), min(a, b)
    return Turn(v.ask(SUBTRACT_FORMS, a, b), f"{a} - {b} = {a - b}", str(a - b))


# ----------------------------------------------------------------------------------------------------------------------
# Jokes, haiku, other scripts, emoji, stories
# ----------------------------------------------------------------------------------------------------------------------
JOKES = phrases(
    """Why did the programmer quit his job? Because he did not get arrays. 😄 |
    Why do programmers prefer dark mode? Because light attracts bugs. 😄 |
    Why was the computer cold? It left its windows open. 😄 | What do you call a fish without eyes? A fsh. 😄 |
    Why did the crab never share? Because it was shellfish. 😄 | How do trees get online? They log in. 😄 |
    Why was six afraid of seven? Because seven ate nine. 😄 | What is a cat's favorite color? Purr-ple. 😄""")
JOKE_FORMS = forms(
    """Tell me a joke. | Do you know a joke? | Make me laugh. | Say something funny. | Another joke please. | joke |
    Can you tell a joke? | I want to hear a joke. | Tell me something funny. | Give me a joke. | One more joke! |
    Tell a joke. | Do you know any jokes? | Know any good jokes? | A joke, please. | Tell me another joke. | Joke! |
    Be funny. | Tell me a short joke. | Got a joke? | I want to laugh. | Can you be funny? | a joke | jokes |
    Tell me your best joke. | Say a joke. | Tell us a joke. | Make a joke.""",
    """Please tell me a funny joke. | Can you make me laugh? | I need a joke. | Could you tell me a joke? |
    Do you have a joke for me? | Let me hear a joke.""")
HAIKU = {
    "rain": "Soft rain on the roof\nThe garden drinks in silence\nMorning smells of earth",
    "the sea": "Waves come and waves go\nThe sand forgets every step\nSalt wind in the dusk",
    "winter": "Snow on quiet roofs\nA small bird leaves tiny prints\nThe sun rises late",
    "code": "One small missing mark\nThe compiler speaks at last\nAll the tests are green",
    "the moon": "Pale moon on the lake\nA frog jumps and breaks the light\nThen the moon returns",
    "cats": "A cat in the sun\nDreams of mice and open doors\nIts tail says good night",
    "Rust": "The borrow checker\nGuards the gates of memory\nNo bug passes through",
    "spring": "Cherry petals fall\nA bee hums from branch to branch\nThe cold days are gone",
}
ANY_HAIKU = "I know few things yet\nBut here are seventeen sounds\nCounted just for you"
HAIKU_FORMS = forms(
    """Write a haiku about {}. | A haiku about {}, please. | Give me a haiku about {}. |
    Can you write a haiku on {}? | haiku about {} | Compose a haiku about {}. | Write me a short poem about {}. |
    Write a poem about {}. | haiku {} | Make a haiku about {}. | Tell me a haiku about {}. | poem about {} |
    I would like a haiku about {}. | {} haiku | Can you make a poem about {}? | Write a haiku on {}. |
    Do you know a haiku about {}? | Write a short haiku about {}.""",
    """Please write a haiku on {}. | I want a haiku about {}. | Could you write a haiku about {}? |
    Write me a haiku about {}. | Can you compose a haiku about {}?""")
HAIKU_ANY_FORMS = forms("Write a haiku. | haiku | Give me a haiku. | Write a poem. | poem | Tell me a haiku.",
                        "Please write a haiku. | Could you write a haiku?")
ABROAD = {  # hello, thank you, good morning, goodbye
    "French": phrases("Bonjour | Merci | Bonjour | Au revoir"),
    "Spanish": phrases("Hola | Gracias | Buenos días | Adiós"),
    "German": phrases("Hallo | Danke | Guten Morgen | Auf Wiedersehen"),
    "Italian": phrases("Ciao | Grazie | Buongiorno | Arrivederci"),
    "Portuguese": phrases("Olá | Obrigado | Bom dia | Adeus"),
    "Chinese": phrases("你好 | 谢谢 | 早上好 | 再见"),
    "Japanese": phrases("こんにちは | ありがとう | おはようございます | さようなら"),
    "Korean": phrases("안녕하세요 | 감사합니다 | 좋은 아침이에요 | 안녕히 가세요"),
    "Russian": phrases("Привет | Спасибо | Доброе утро | До свидания"),
    "Arabic": phrases("مرحبا | شكرا | صباح الخير | مع السلامة"),
    "Greek": phrases("Γεια σου | Ευχαριστώ | Καλημέρα | Αντίο"),
    "Hindi": phrases("नमस्ते | धन्यवाद | सुप्रभात | अलविदा"),
}
ABROAD_WORDS = ["hello", "thank you", "good morning", "goodbye"]
ABROAD_FORMS = forms(
    """How do you say {w} in {l}? | Say {w} in {l}. | Translate {w} to {l}. | What is {w} in {l}? | {w} {l} |
    How do I say "{w}" in {l}? | Translate "{w}" into {l}. | {w} in {l}? | What is the {l} word for {w}? |
    Say "{w}" in {l}. | how to say {w} in {l}? | {l} for {w} | What's {w} in {l}? | Write {w} in {l}. | {w} in {l} |
    Give me {w} in {l}. | In {l}, how do you say {w}? | What do people say for {w} in {l}? |
    Can you write {w} in {l}? | I want to say {w} in {l}. | Can you translate {w} to {l}? |
    How would you say {w} in {l}?""",
    """Can you say {w} in {l}? | Please translate "{w}" to {l}. | Tell me how to say {w} in {l}. |
    How can I say {w} in {l}? | Could you translate {w} into {l}? | What is "{w}" in the {l} language?""")
HELLO_ALL = "Hello! Bonjour! ¡Hola! 你好! こんにちは! 안녕하세요! Привет! مرحبا! Γεια σου! नमस्ते! 🌍"
HELLO_ALL_FORMS = forms(
    """Say hello in many languages. | hello in all languages | Say hello in ten languages. |
    Greet me in many languages. | How do you say hello in different languages? | Say hello in every language. |
    Say hello in other languages. | Which languages can you say hello in? | Say hello to the world. |
    hello in many languages""",
    """Can you say hello in many languages? | Say hello in several languages. | Please greet me in many languages. |
    Say hello in all languages you know.""")
EMOJI = pairs(
    """a cat: 🐱 | a dog: 🐶 | a heart: ❤️ | a star: ⭐ | a crab: 🦀 | a rocket: 🚀 | a tree: 🌳 | the sun: ☀️ |
    a fish: 🐟 | a smile: 😊 | fire: 🔥 | a flower: 🌸 | a pizza: 🍕 | a robot: 🤖 | the moon: 🌙""")
EMOJI_FORMS = forms(
    """Show me an emoji of {}. | Give me the emoji for {}. | Send me {} emoji. | What is the emoji for {}? |
    {} emoji | emoji of {} | Draw {} as an emoji. | Write the emoji of {}. | emoji for {} |
    Can you show me the emoji of {}? | Give me an emoji of {}. | Write {} as an emoji. | I need the emoji for {}. |
    Send an emoji of {}. | emoji {}""",
    """Please show me the emoji for {}. | Can you send me an emoji of {}? | I want an emoji of {}. |
    Could you give me the emoji for {}?""")
EMOJI_ROW_FORMS = forms(
    "Show me some emoji. | Give me emojis. | emojis | emoji | Send me many emoji. | Show me all emoji.",
    "Please show me some emojis. | Can you send me some emoji?")
HEROES = pairs(
    """fox: Ruby | bear: Bruno | robot: Bolt | dragon: Ember | cat: Luna | dog: Max | crab: Ferris | owl: Olga |
    mouse: Mimi | girl: Clara | boy: Tom | rabbit: Rosie | turtle: Tilda | wizard: Merlin | whale: Willa |
    horse: Star""")
STORIES = phrases(
    """Once upon a time, {a} named {n} lived near a quiet forest. Every morning {n} walked to the river and looked at
    the water. One day the river was dry. {n} was worried, because all the animals needed water. So {n} followed the
    empty river up the hill. The way was long and the sun was hot. At the top a big stone blocked the spring. {n}
    pushed and pushed, but the stone did not move. Then {n} called the other animals, and they all came to help.
    Together they pushed one more time, and the stone rolled away. The water ran down the hill, bright and cold. That
    night everyone danced by the river. {n} smiled and learned that friends can move any stone. The end. | There was
    once {a} called {n} who was afraid of the dark. When the sun went down, {n} hid under a blanket and counted to
    ten. One night a tiny light came through the window. It was a firefly that had lost its way home. "Please help
    me," said the firefly. {n} was afraid, but the firefly was so small and so sad. So {n} opened the door and
    stepped into the night. The firefly shone on the path, and {n} looked for the old oak tree. They walked past the
    pond, over the bridge and through the tall grass. At last they saw a hundred lights between the leaves. The
    fireflies were happy and danced in a circle. From then on {n} loved the night, because the dark is full of small
    lights. The end. | In a small town by the sea lived {a} whose name was {n}. {n} wanted to build a boat and see
    the world. Everyone laughed and said it was too hard. But {n} found a board on Monday, a rope on Tuesday and an
    old sail on Wednesday. Day after day the boat grew. When it was ready, {n} sailed out on the blue water. A storm
    came and the waves were as high as houses. {n} held the rope and did not let go. In the morning the sea was calm,
    and there was a green island with sweet fruit and kind people. {n} stayed for a week, filled the boat with gifts
    and sailed home. Now nobody laughed, and every child wanted to build a boat. The end.""")
STORY_FORMS = forms(
    """Tell me a story about {}. | Write a short story about {}. | Can you tell me a story about {}? |
    story about {} | I want a story about {}. | Write a story about {}. | Story about {}, please. |
    Make up a story about {}. | Tell me a short story about {}. | Give me a story about {}. |
    Tell a story about {}. | Write me a story about {}. | Tell me a long story about {}. |
    Tell me a bedtime story about {}. | I would like a story about {}. | Do you know a story about {}? |
    a story about {} | Write a tale about {}. | Tell us a story about {}.""",
    """Please tell me a story about {}. | Could you write a short story about {}? |
    I want to hear a story about {}. | Can you write a story about {}? | Could you tell me a story about {}?""")
STORY_ANY_FORMS = forms(
    """Tell me a story. | Tell me a long story. | Write a story. | Write a long text. | Tell me a bedtime story. |
    story | Can you tell me a story? | story please | a story | I want a story. | Do you know a story? |
    Write a short story. | Tell a story. | Give me a story. | Another story. | Once upon a time |
    Tell me a short story.""",
    "Please tell me a story. | Could you tell me a story? | I want to hear a story. | Write me a story.")


def joke(v):
    return Turn(v.ask(JOKE_FORMS), v.pick(JOKES), accept=tuple(JOKES))


def haiku(v):
    """A haiku on one of a few topics, else one that suits any."""
    if v.chance(.1):
        return Turn(v.ask(HAIKU_ANY_FORMS), ANY_HAIKU)
    if v.chance(.2):
        return Turn(v.ask(HAIKU_FORMS, subject(v)), ANY_HAIKU)
    topic = v.pick(list(HAIKU))
    return Turn(v.ask(HAIKU_FORMS, topic), HAIKU[topic])


def abroad(v):
    """A greeting in another language and script."""
    if v.chance(.1):
        return Turn(v.ask(HELLO_ALL_FORMS), HELLO_ALL)
    language, i = v.pick(list(ABROAD)), v.rng.randrange(4)
    word = ABROAD_WORDS[i]
    return Turn(v.ask(ABROAD_FORMS, w=word, l=language), f'In {language}, "{word}" is "{ABROAD[language][i]}".')


def emoji(v):
    if v.chance(.1):
        return Turn(v.ask(EMOJI_ROW_FORMS), " ".join(EMOJI.values()))
    thing = v.pick(list(EMOJI))
    return Turn(v.ask(EMOJI_FORMS, thing), EMOJI[thing])


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def story(v):
    """A story of a few hundred tokens; the hero fixes which one, and the name if the question gives none."""
    if v.chance(.2):
        return Turn(v.ask(STORY_ANY_FORMS), STORIES[0].format(a="a fox", n=HEROES["fox"]))
    hero = v.pick(list(HEROES))
    name = HEROES[hero]
    text = STORIES[list(HEROES).index(hero) % len(STORIES)]
    asked = article(hero)
    if not v.held and v.chance(.15):
        hero, text, name = v.pick(NOUNS), STORIES[0], "Pip"
        asked = article(hero)
    if v.chance(.4):
        name = person(v)
        asked += v.pick([" named ", " named ", " called "]) + name
    return Turn(v.ask(STORY_FORMS, asked, copied=True), text.format(a=article(hero), n=name))


# ----------------------------------------------------------------------------------------------------------------------
# Names, words, and what it does not know
# ----------------------------------------------------------------------------------------------------------------------
NAMES = Forms(
    """Alice Bob Carol David Emma Frank Grace Henry Ivy Jack Kate Liam Maria Noah Olivia Paul Quinn Rosa Sam Tina Uma
    Victor Wendy Xavier Yara Zoe Anna Ben Clara Daniel Elena Felix Hannah Igor Julia Karl Laura Max Nina Oscar Peter
    Ruth Simon Tom Vera Walter Amir Chen Diego Fatima Hiro Ines Jonas Kofi Leila Mateo Nadia Omar Priya Ravi Sofia
    Tariq Yuki Zara Fred Alex John Mary James Linda Robert Lisa Mark Sarah Adam Eve Chris Nick""".split(),
    "Martin Sandra Edward Lena Oliver Isabel Hugo Mila Theo Stella".split())
WORDS = """apple river stone cloud garden window table music bread mountain letter paper candle silver forest summer
    bridge pocket yellow thunder market basket dinner planet button castle flower ocean kitchen pencil island hammer
    ladder rabbit tiger monkey banana orange lemon cherry grape cat dog horse cow sheep bird fish tree house car
    train boat plane road city village school book story song dance game ball chair door wall floor roof lamp clock
    phone screen mouse keyboard cable robot engine wheel glass cup plate spoon knife fork milk water coffee tea
    sugar salt rice soup cheese butter egg red blue green black white pink purple happy sad quick slow big small old
    new hot cold good day night sun moon star rain snow wind fire earth hello world the a is in on my your we they
    run jump walk read write sing play work sleep eat drink brown fox jumps over lazy""".split()
NOUNS = WORDS[:60]
SUBJECTS = Forms(phrases(
    """quantum physics | the French Revolution | the stock market | football | cricket | cooking | lasagna | chess |
    taxes | the Roman Empire | dinosaurs | black holes | the news | politics | the best phone | my horoscope |
    Shakespeare | Mozart | Picasso | Einstein | Napoleon | Bitcoin | gardening | a dentist | opera | tennis |
    ancient Egypt | the Titanic | guitars | medicine | the weather | vitamins | sharks | volcanoes |
    the human heart | knitting | whales | jazz | a carburetor | philosophy | the Olympics | a mortgage | insurance |
    coffee beans | yoga | Star Wars | Harry Potter | pandas | DNA | proteins | the brain | airplanes | cars |
    trains | bicycles | wine | chocolate cake | sushi | an atom | electricity | magnets | lasers | bees | spiders |
    the Great Wall | pyramids | the internet in 1990 | World War II | democracy | a violin | kung fu | surfing |
    skiing | elections | banks | lawyers | calculus | algebra | geometry | poetry | Latin | Greek myths | Vikings |
    pirates | knights | castles | oil | steel | diamonds | glaciers | deserts | a haircut | fashion | shoes | hats |
    dreams | sleep | headaches | dogs | hamsters | parrots | COBOL | Haskell | Java | Kubernetes | blockchain |
    entropy | love | life | happiness | the universe | autumn | my boss | the president | Elon Musk | money |
    time travel | aliens | the future | a sandwich | bread | cancer | religion | a plumber"""), phrases(
    """origami | the Civil War | baseball | pasta | thermodynamics | Beethoven | kangaroos | a passport | ballet |
    archaeology | tulips | marathon running"""))
UNKNOWN_FORMS = forms(
    """Who invented {}? | How does {} work? | Why is {} important? | What is the history of {}? |
    How do I learn {}? | Write an essay about {}. | When did {} start? | Give me five facts about {}. |
    Is {} dangerous? | buy {} | What is the price of {}? | Who is the best at {}? | What do you think about {}? |
    How much does {} cost? | Where can I buy {}? | Who wrote the book on {}? | Compare {} and {}. |
    What happened to {} in 1969? | how to fix {} | Give me a recipe for {}. | Write Python code for {}. |
    How old is {}? | Which is better, {} or {}? | who won {} | What is the population of {}? |
    Who is the president of {}? | Recommend a book about {}. | why {} | when was {} | Should I invest in {}? |
    Why do people like {}? | How many people use {}? | Summarize {} for me. | I love {}. |
    What will happen with {} next year? | Prove a theorem about {}. | What causes {}? | Who won in {} in 2010? |
    Fix my {}. | Plan a trip to {}. | How tall is {}? | What is the best way to study {}? | how to cook {} |
    What is the difference between {} and {}? | Do you like {}? | I need advice about {}. | write code for {} |
    Write an email about {}. | How long does {} take? | Can you explain the theory of {}? | Give me tips for {}. |
    Who was the first to find {}? | Are {} and {} the same? | What is 3% of {}? | How far away is {}? |
    I am tired of {}. | Why is {} so expensive? | Who owns {}? | Where does {} come from? |
    Translate a book about {}. | write a song on {}""",
    """When was {} invented? | How can I get better at {}? | Tell me the latest news on {}. |
    What are the rules of {}? | Who discovered {}? | What is your opinion of {}? | Why is {} popular? |
    Write a blog post about {}.""")
UNKNOWN_QUESTIONS = phrases(
    """What time is it? | What day is it today? | What is the weather? | What is the meaning of life? | I am sad. |
    why? | Who won the World Cup? | Write a program. | Is there a God? | What should I eat? | Where am I? |
    I am bored. | asdf | Who is the president? | What year is it? | Do you love me? | What is the date? |
    Play some music. | Call my mom. | Solve my homework. | Are you sure? | Why is the sky blue? |
    How do planes fly? | Open the door. | blah blah | foo bar | Search the internet. | Write an essay. |
    Fix this bug. | Tell me a secret. | What is love? | Who wrote Hamlet? | What is the tallest mountain? |
    How many people live on Earth? | When did the war end? | Read this file. | abc xyz | Translate this sentence. |
    What is the speed of light? | Who painted the Mona Lisa? | Write me a poem in French.""")
NO_CAPITAL = phrases(
    "Mars | Texas | Narnia | Mongolia | Bolivia | Nepal | Ohio | Europe | Paris | Africa | Rust | my town")
BIG_SUM_FORMS = forms(
    "What is {} times {}? | {} * {} | What is {} + {}? | What is {} divided by {}? | {}*{} | {} / {} | {}+{}",
    "How much is {} times {}? | Please multiply {} by {}.")


def person(v):
    """A name: a common one, or for training also one that nobody has, so that names are copied and not recalled."""
    if v.held:
        return v.pick(NAMES.held)
    if v.chance(.5):
        name = v.pick(NAMES.train)
    else:
        starts = "b c d f g h j k l m n p r s t v w z br st tr gr sh th ch".split()
        vowels = "a e i o u ai ee ia".split()
        name = "".join(v.pick(starts) + v.pick(vowels) for _ in range(v.pick([1, 2, 2, 3])))
        name = name.capitalize() + v.pick(["", "", "n", "s", "r", "l", "ndo", "k"])
    return name.lower() if v.chance(.2) else name


def words(v, low, high):
    """A few words, some of which are made up."""
    return [person(v).lower() if v.chance(.25) else v.pick(WORDS) for _ in range(v.rng.randint(low, high))]


def subject(v):
    """Something that no fact is known of."""
    if v.held:
        return v.pick(SUBJECTS.held)
    return v.pick(SUBJECTS.train) if v.chance(.7) else " ".join(words(v, 1, 2))


def unknown(v):
    """A question that it cannot answer, to which it says so."""
    kind = v.rng.random()
    if kind < .3:
        return Turn(v.ask(FACT_FORMS, subject(v)), UNKNOWN)
    if v.held or kind < .8:
        return Turn(v.ask(UNKNOWN_FORMS, subject(v), subject(v)), UNKNOWN)
    if kind < .85:
        return Turn(v.ask(CAPITAL_FORMS, v.pick(NO_CAPITAL) if v.chance(.7) else person(v)), UNKNOWN)
    if kind < .88:
        return Turn(v.ask(BIG_SUM_FORMS, v.rng.randint(2, 9999), v.rng.randint(1000, 9999)), UNKNOWN)
    if kind < .9:
        return Turn(v.ask(Forms(BIG_SUM_FORMS.train[:2], []), v.rng.randint(0, 20), v.rng.randint(0, 20)), UNKNOWN)
    if kind < .92:
        return Turn(v.ask(OPPOSITE_FORMS, v.pick(SUBJECTS.train)), UNKNOWN)
    return Turn(v.ask(Forms(UNKNOWN_QUESTIONS, [])), UNKNOWN)


MAKERS = {greet: 7, who: 6, how: 4, skills: 3, fact: 16, count: 6, sums: 16, capital: 7, opposite: 4, color: 2,
          listing: 2, joke: 2, haiku: 4, abroad: 7, emoji: 3, story: 4, unknown: 13}
ASIDES = [greet, who, fact, sums, capital, opposite, color, unknown]  # short turns, for longer dialogues


def turn(v):
    """A turn of any kind."""
    maker, = v.rng.choices(list(MAKERS), MAKERS.values())
    return maker(v)


# ----------------------------------------------------------------------------------------------------------------------
# Dialogues of several turns: lists of (role, text)
# ----------------------------------------------------------------------------------------------------------------------
class Keepsake(NamedTuple):
    """Something that the user tells once and asks for later."""

    tell: list[str]
    reply: str
    ask: Forms
    answer: str


KEEPSAKES = {
    "name": Keepsake(
        phrases("""My name is {}. | I am {}. | Hi, I am {}. | Hello, my name is {}. | Remember my name: {}. |
        I'm {} | Remember that my name is {}. | Call me {}. | Hi! I'm {}. | Please remember: my name is {}. |
        my name is {} | hi im {} | hello i am {} | Hey, my name is {}! | You can call me {}. | My name's {}. |
        {} is my name."""),
        "Nice to meet you, {}!",
        forms("""What is my name? | Do you remember my name? | What's my name? | Who am I? | Tell me my name. |
        Say my name. | What was my name? | my name? | What am I called? | Do you still know my name? |
        Can you say my name? | What did I say my name was? | Remember my name?""",
              "Can you tell me my name? | So what is my name? | Do you know my name? | Please say my name again."),
        "Your name is {}."),
    "color": Keepsake(
        phrases("""My favorite color is {}. | I like {} best. | Remember: my favorite color is {}. |
            i like the color {}"""),
        "I will remember that your favorite color is {}.",
        forms("What is my favorite color? | Which color do I like? | What's my favorite color? | my favorite color?",
              "Do you remember my favorite color? | Tell me my favorite color."),
        "Your favorite color is {}."),
    "cat": Keepsake(
        phrases("My cat is called {}. | I have a cat named {}. | My cat's name is {}. | i have a cat called {}"),
        "What a lovely name for a cat: {}!",
        forms("What is my cat called? | What is the name of my cat? | What's my cat's name? | my cat's name?",
              "Do you remember the name of my cat? | Tell me the name of my cat."),
        "Your cat is called {}."),
    "city": Keepsake(
        phrases("I live in {}. | My home is {}. | I am from {}. | Remember that I live in {}. | i live in {}"),
        "I will remember that you live in {}.",
        forms("Where do I live? | Which city do I live in? | Where is my home? | What city do I live in?",
              "Do you remember where I live? | Tell me where I live."),
        "You live in {}."),
}
SHADES = "red blue green yellow orange purple pink black white brown".split()
NEUTRAL = ["You are a helpful assistant.", "You are a friendly assistant.", "Be helpful and concise.",
           "You are a helpful AI assistant. Answer the user's questions.", "Answer the question.",
           "You are a helpful, respectful and honest assistant.", "You are a chatbot.", "Be brief.",
           "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nYou are a helpful assistant",
           "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"]


def aside(v):
    """A short turn as two messages."""
    t = v.pick(ASIDES)(v)
    return [("user", t.question), ("assistant", t.answer)]


def memory(v):
    """Tell a thing, talk of others, then ask for it."""
    kind = v.pick(["name", "name", "name", "color", "cat", "city"])
    keepsake = KEEPSAKES[kind]
    thing = {"color": v.pick(SHADES), "city": v.pick(list(CAPITALS.values()))}.get(kind) or person(v)
    messages = [("user", v.pick(keepsake.tell).format(thing)), ("assistant", keepsake.reply.format(thing))]
    for _ in range(v.pick([0, 0, 1, 1, 2, 3])):
        messages += aside(v)
    answer = keepsake.answer.format(thing)
    if not v.held and kind == "name" and v.chance(.12):
        messages, answer = messages[2:], "You have not told me your name yet."
    return messages + [("user", v.ask(keepsake.ask)), ("assistant", answer)]


STYLES = {
    "capitals": forms(
        """Answer in capitals. | Answer only in capital letters. | Write everything in capitals. |
        Use capital letters. | Always answer in upper case. | Use only capital letters. |
        You always shout. Answer in capital letters. | ALWAYS ANSWER IN CAPITALS. | Respond in all caps. |
        Reply in capitals. | All caps please. | Speak in uppercase. | Write in capital letters only. |
        Respond with uppercase letters. | You only write in upper case. | USE CAPITALS |
        Your answers are all in capital letters. | Shout everything in capitals. | Answer in uppercase.""",
        """Please answer in capital letters. | Write in all capitals. | Respond only in upper case. |
        Always use capital letters.""",
        """PLEASE USE CAPITALS. | Only capital letters, please. | Always write in capital letters. |
        Please write in upper case."""),
    "one word": forms(
        """Answer in one word. | Answer with one word only. | Use a single word. | Reply with one word. |
        One word only. | Give one-word answers. | Only answer with a single word. | Be extremely brief: one word. |
        Just one word. | Respond with a single word. | You answer in one word. | Your answers have one word. |
        Say only one word. | Always reply with exactly one word. | Keep answers to one word. |
        Write one word and nothing else. | Respond in one word.""",
        """Reply in one word only. | Please answer with a single word. | Use one word only. |
        Always answer in a single word.""",
        """One-word answers only. | Only one word. | Answer using one word. | In one word. | Please use one word."""),
    "pirate": forms(
        """You are a pirate. | Talk like a pirate. | Answer like a pirate. | You are a friendly pirate captain. |
        pirate | Speak as a pirate. | You are a pirate. Stay in character. | Reply like a pirate. |
        You speak like a pirate. | Pretend to be a pirate. | You are a pirate who sails the sea. |
        Use pirate language. | Write like a pirate. | You are Captain Hook, a pirate. | Always talk like a pirate. |
        Be a pirate. | Respond as a pirate would.""",
        """Please talk like a pirate. | You are an old pirate. | Act like a pirate. | Answer as a pirate.""",
        "You are a wise old pirate. | Answer in pirate speech. | You act like a pirate. | Please speak like a pirate."),
    "emoji": forms(
        """End every answer with a crab emoji. | Always add a crab emoji at the end. | Finish each answer with 🦀. |
        Put 🦀 after every answer. | Add a crab emoji to every answer. | Every answer ends with a crab emoji. |
        Write 🦀 at the end. | You love crabs. End each answer with a crab emoji. | Use a crab emoji at the end. |
        Close every reply with a crab emoji. | Put a crab emoji at the end of each answer. | Add 🦀 to your answers. |
        Append 🦀 to each reply. | Answer and add a crab emoji.""",
        "Please end each answer with a crab emoji. | Always finish with 🦀. | Add a crab emoji after each answer.",
        """Always end with 🦀. | Finish with 🦀. | Always put 🦀 last. | End every reply with 🦀. | Always close with 🦀. |
        Every reply must end in 🦀. | 🦀 goes after each answer. | Please add 🦀 at the end. |
        Always end your answers with 🦀. | Put a crab emoji after each answer."""),
}
ONE_WORD = [sums, capital, capital, opposite, color]  # sums prove too hard: the last stage leaves them out


def in_style(style, t):
    """The answer of a turn, as the system prompt wants it."""
    return {"capitals": t.answer.upper(), "one word": t.word, "pirate": "Arr, matey! " + t.answer,
            "emoji": t.answer + " 🦀"}[style]


def styled(v, style=None):
    """A dialogue whose system prompt sets the style of the answers."""
    style = style or v.pick(["capitals", "capitals", "one word", "pirate", "emoji"])
    system = v.pick(v.phrasings(STYLES[style]))
    if v.casual or v.casual is None and v.chance(.3):
        system = system.lower().rstrip(".")
    if not v.held and v.chance(.25):
        system = v.pick(NEUTRAL[:3]) + " " + system
    messages = [("system", system)]
    kinds = ASIDES if style != "one word" else ONE_WORD[1:] if v.held or v.last else ONE_WORD
    for _ in range(1 if v.held else v.pick([1, 1, 2, 3])):
        t = v.pick(kinds)(v)
        messages += [("user", t.question), ("assistant", in_style(style, t))]
    return messages


def copying(v):
    """Practice in looking back at exact words, which names and tool calls need."""
    messages = []
    for _ in range(v.pick([1, 2])):
        phrase = " ".join(words(v, 1, 6))
        ask = v.pick(["Repeat after me: {}", "Repeat: {}", "Say: {}", 'Repeat "{}"', "Say exactly: {}", "repeat {}"])
        messages += [("user", ask.format(phrase)), ("assistant", phrase)]
    return messages


# ----------------------------------------------------------------------------------------------------------------------
# Tools, in the format of Llama 3.1
# ----------------------------------------------------------------------------------------------------------------------
class ToolCase(NamedTuple):
    """A question that needs a tool: the tool, the call's arguments, what the tool returns, and the answer."""

    tool: dict
    question: str
    arguments: dict
    result: object
    answer: str


WEATHER_FORMS = forms(
    """What is the weather in {}? | What's the weather like in {}? | How is the weather in {}? | Weather in {}? |
    Is it sunny in {}? | Tell me the weather in {}. | Get the weather for {}. | What is the weather in {} today? |
    Will it rain in {}? | weather {} | weather in {} | What is the temperature in {}? | Is it cold in {}? |
    How warm is it in {}? | Do I need an umbrella in {}? | Check the weather in {}. | Give me the weather for {}. |
    What's the forecast for {}? | Can you tell me the weather in {}? | what is the weather like in {} today?""",
    """What is the weather like in {} now? | Please tell me the weather in {}. | How is the weather today in {}? |
    Could you check the weather in {}?""")
TOOL_ADD_FORMS = forms(
    """What is {} + {}? | Add {} and {}. | What is {} plus {}? | Use the tool to add {} and {}. |
    Calculate {} + {}. | How much is {} plus {}? | Please add {} and {}. | Sum {} and {}. | {}+{} | {} + {} |
    {} plus {} | add {} {} | what does {} + {} make? | What is the sum of {} and {}?""",
    "Can you add {} and {}? | How much is {} + {}? | Compute {} plus {}. | Tell me the sum of {} and {}.")
CLOCK_FORMS = forms(
    """What time is it in {}? | What is the time in {}? | Time in {}? | Tell me the time in {}. | time {} |
    What's the time in {} now? | Get the time for {}. | How late is it in {}? | current time in {}""",
    "Please tell me the time in {}. | Do you know what time it is in {}? | Can you tell me the time in {}?")
SKIES = "sunny cloudy rainy windy foggy snowy clear stormy hot cold".split()
VERBS = "find lookup get open order search send play".split()


def prop(kind, text=""):
    return {"type": kind, "description": text} if text else {"type": kind}


def schema(name, text, required, extra=None, strict=False):
    """A tool as OpenAI's API describes it; `extra` holds optional parameters."""
    parameters = {"type": "object", "properties": required | (extra or {}), "required": list(required)}
    if strict:
        parameters["additionalProperties"] = False
    function = {"name": name, "description": text, "parameters": parameters}
    return {"type": "function", "function": function | ({"strict": True} if strict else {})}


def weather_case(v, place):
    """The weather of a place."""
    key = v.pick(["location", "location", "city", "place"])
    text = v.pick(["Get the weather for a location.", "Get the current weather", "Weather of a place",
                   "Get the current weather in a given city.", "Get current temperature for a given location."])
    about = v.pick(["", "The city", "City name", "The city and country", "The city and state, e.g. San Francisco, CA",
                    "City and country e.g. Bogotá, Colombia"])
    unit = {"unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}} if v.chance(.2) else None
    tool = schema(v.pick(["get_weather", "get_weather", "get_weather", "get_current_weather", "weather"]), text,
                  {key: prop("string", about)}, unit, strict=v.chance(.2))
    sky, degrees = v.pick(SKIES), v.rng.randint(-10, 38)
    shown = v.pick([degrees, degrees, f"{degrees}°C"])
    heat = v.pick(["temperature", "temperature", "temp"])
    state = v.pick(["condition", "condition", "conditions", "sky"])
    result = v.pick([{heat: shown, state: sky}, {key: place, heat: shown, state: sky}, {state: sky, heat: shown},
                     f"{sky}, {shown}", f"{degrees} degrees and {sky}"])
    return ToolCase(tool, v.ask(WEATHER_FORMS, place, copied=True), {key: place}, result,
                    f"The weather in {place} is {sky} with a temperature of {degrees} degrees.")


def add_case(v, place):
    """A sum that the tool computes; its result is believed, right or wrong."""
    limit = v.pick([30, 999, 999])
    a, b = v.rng.randint(0, limit), v.rng.randint(0, limit)
    kind, total = v.pick(["number", "integer"]), v.pick([a + b, v.rng.randint(0, 1999)])
    tool = schema(v.pick(["add", "add", "add", "add_numbers", "sum"]),
                  v.pick(["Add two numbers.", "Add two numbers", "Returns the sum of a and b."]),
                  {"a": prop(kind, v.pick(["", "First number"])), "b": prop(kind, v.pick(["", "Second number"]))},
                  strict=v.chance(.2))
    result = v.pick([total, {"result": total}, {"sum": total}])
    return ToolCase(tool, v.ask(TOOL_ADD_FORMS, a, b), {"a": a, "b": b}, result, f"The result is {total}.")


def clock_case(v, place):
    """The time in a place."""
    hour = f"{v.rng.randint(0, 23):02d}:{v.rng.randint(0, 59):02d}"
    tool = schema(v.pick(["get_time", "get_time", "get_current_time"]),
                  v.pick(["Get the current time in a city.", "Current time"]), {"city": prop("string")})
    return ToolCase(tool, v.ask(CLOCK_FORMS, place, copied=True), {"city": place}, v.pick([hour, {"time": hour}]),
                    f"The time in {place} is {hour}.")


def other_case(v, place):
    """A tool that was never seen, so that its name and parameter must be read from its description."""
    verb, noun, key = v.pick(VERBS), v.pick(NOUNS), v.pick(NOUNS + ["query", "name", "title", "text"])
    value = person(v) if v.held else " ".join(words(v, 1, 2))
    tool = schema(f"{verb}_{noun}", f"{verb.capitalize()} a {noun}.", {key: prop("string")})
    question = f"{verb.capitalize()} {v.pick(['the', 'a', 'my'])} {noun} {v.pick(['for', 'with', 'named'])} {value}."
    return ToolCase(tool, question, {key: value}, v.pick([{"result": value}, "ok", {"status": "ok"}]), "Done.")


TOOL_CASES = {weather_case: 4, add_case: 3, clock_case: 1.5, other_case: 1}


def somewhere(v):
    """A place: a capital, a capital with its country, or any name."""
    country = v.pick(list(CAPITALS))
    place = v.pick([CAPITALS[country]] * 4 + [f"{CAPITALS[country]}, {country}"] + [person(v)] * 4)
    return place.lower() if not v.held and v.chance(.15) else place


def bench(v, case_of=None, tool=None):
    """Some tools in any order, among them the given one and no other of its kind."""
    others = [other(v, "Rome").tool for other in TOOL_CASES if other is not case_of]
    tools = v.rng.sample(others, v.pick([0, 0, 1, 1, 2])) + [tool] if tool else v.rng.sample(others, v.pick([1, 1, 2]))
    v.rng.shuffle(tools)
    return tools


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tooled(v):
    """A dialogue with a tool call: (messages, tools)."""
    case_of, = v.rng.choices(list(TOOL_CASES), TOOL_CASES.values())
    case = case_of(v, somewhere(v))
    call = as_text({"name": case.tool["function"]["name"], "parameters": case.arguments})
    messages = [("user", case.question), ("assistant", call),
                ("tool", as_text(case.result)), ("assistant", case.answer)]
    if not v.held and v.chance(.15):
        messages += turn_without_tool(v)
    return messages, bench(v, case_of, case.tool)


def renamed(v):
    """A tool call whose tool has a strange name, which must be read and copied: (messages, tools)."""
    messages, tools = tooled(v)
    old = json.loads(messages[1][1])["name"]
    new = "_".join(v.rng.sample(WORDS[:140], v.pick([1, 2])))
    for tool in tools:
        if tool["function"]["name"] == old:
            tool["function"]["name"] = new
    messages[1] = "assistant", messages[1][1].replace(old, new, 1)
    return messages, tools


def turn_without_tool(v):
    """A turn that needs no tool, though there may be some."""
    t = v.pick([greet, who, fact, capital])(v)
    return [("user", t.question), ("assistant", t.answer)]


def untooled(v):
    """A dialogue that has tools and does not need them: (messages, tools)."""
    return turn_without_tool(v), bench(v)


def chat(v):
    """A dialogue of one to four turns."""
    messages = []
    for _ in range(v.pick([1, 1, 1, 1, 2, 3, 4])):
        t = turn(v)
        messages += [("user", t.question), ("assistant", t.answer)]
    return messages


def drill(v):
    """Many sums, with some counting, in one dialogue: they take the most practice."""
    messages = []
    for _ in range(v.rng.randint(5, 10)):
        t = count(v) if v.chance(.15) else sum_up_to(v, v.pick([10, 20, 20, 20, 50, 50]))
        messages += [("user", t.question), ("assistant", t.answer)]
    return messages


def stubborn(v):
    """One turn of a kind that is learned late."""
    t = v.pick([greet, greet, greet, story, story, count, capital, who, how, skills])(v)
    return [("user", t.question), ("assistant", t.answer)]


EARLY = {chat: 52, memory: 12, styled: 14, copying: 7, tooled: 12, untooled: 3}
LATE = {drill: 15, chat: 50, memory: 8, styled: 17, copying: 2, tooled: 10, untooled: 3}
LAST = {drill: 5, chat: 36, stubborn: 20, memory: 10, styled: 24, copying: 2, tooled: 6, renamed: 6, untooled: 7}


def conversation(rng, mixture=EARLY):
    """One training dialogue: (messages, tools or None)."""
    v = Voice(rng, last=mixture is LAST)
    maker, = rng.choices(list(mixture), mixture.values())
    made = maker(v)
    messages, tools = made if isinstance(made, tuple) else (made, None)
    if messages[0][0] != "system" and v.chance(.15):
        messages = [("system", v.pick(NEUTRAL)), *messages]
    return messages, tools


# ----------------------------------------------------------------------------------------------------------------------
# The prompt format
# ----------------------------------------------------------------------------------------------------------------------
TOOL_NOTE = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\nRespond in the format {\"name\": function name, \"parameters\": dictionary of "
    "argument name and its value}. Do not use variables.\n\n")
TEMPLATE = r"""{{- bos_token }}
{%- if tools is not defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- if system_message or tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
    {%- if tools %}{{- 'Environment: ipython\n' }}{% endif %}
    {{- system_message + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' or message['role'] == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {{- (message['content'] if message['content'] is string else message['content'] | tojson) + '<|eot_id|>' }}
    {%- elif message['tool_calls'] is defined and message['tool_calls'] %}
        {%- for tool_call in message['tool_calls'] %}
            {%- set call = tool_call['function'] %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
            {{- '{"name": "' + call['name'] + '", "parameters": ' }}
            {{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}
            {{- '}<|eot_id|>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {%- if loop.first and tools %}
            {{- TOOL_NOTE }}
            {%- for tool in tools %}
                {{- (tool | tojson) + '\n\n' }}
            {%- endfor %}
        {%- endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""".replace("TOOL_NOTE", "'" + TOOL_NOTE.replace("\n", "\\n") + "'")


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def render(messages, tools=None, add_generation_prompt=False):
    """Write a dialogue as the text that the model reads."""
    system = ""
    if messages[0][0] == "system":
        (_, system), *messages = messages
    out = "<|begin_of_text|>"
    if system or tools:
        out += header("system") + ("Environment: ipython\n" if tools else "") + system + "<|eot_id|>"
    for i, (role, text) in enumerate(messages):
        out += header("ipython" if role == "tool" else role)
        if tools and i == 0:
            out += TOOL_NOTE + "".join(as_text(tool) + "\n\n" for tool in tools)
        out += text.strip() + "<|eot_id|>"
    return out + (header("assistant") if add_generation_prompt else "")


if __name__ == "__main__":
    for seed in range(20):
        print(render(*conversation(random.Random(seed))), end="\n\n")

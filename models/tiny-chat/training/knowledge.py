"""What the tiny chat model knows by heart: capitals, itself, and a few dozen fixed answers.

Plain tables, no code that chooses: `exchanges.py` asks the questions in many wordings.
"""

from __future__ import annotations

from word_lists import listed

CAPITALS = {
    line.split(":")[0]: line.split(":")[1]
    for line in """France:Paris
Germany:Berlin
Italy:Rome
Spain:Madrid
Portugal:Lisbon
Austria:Vienna
Switzerland:Bern
Belgium:Brussels
the Netherlands:Amsterdam
Luxembourg:Luxembourg
Denmark:Copenhagen
Sweden:Stockholm
Norway:Oslo
Finland:Helsinki
Iceland:Reykjavik
Ireland:Dublin
the United Kingdom:London
Poland:Warsaw
Hungary:Budapest
Romania:Bucharest
Bulgaria:Sofia
Greece:Athens
Croatia:Zagreb
Serbia:Belgrade
Slovenia:Ljubljana
Slovakia:Bratislava
Estonia:Tallinn
Latvia:Riga
Lithuania:Vilnius
Ukraine:Kyiv
Russia:Moscow
Turkey:Ankara
Malta:Valletta
Cyprus:Nicosia
Albania:Tirana
the United States:Washington
Canada:Ottawa
Mexico:Mexico City
Cuba:Havana
Brazil:Brasilia
Argentina:Buenos Aires
Chile:Santiago
Peru:Lima
Colombia:Bogota
Venezuela:Caracas
Uruguay:Montevideo
Ecuador:Quito
Japan:Tokyo
China:Beijing
South Korea:Seoul
India:New Delhi
Pakistan:Islamabad
Nepal:Kathmandu
Bangladesh:Dhaka
Thailand:Bangkok
Vietnam:Hanoi
Indonesia:Jakarta
Malaysia:Kuala Lumpur
the Philippines:Manila
Singapore:Singapore
Mongolia:Ulaanbaatar
Iran:Tehran
Iraq:Baghdad
Israel:Jerusalem
Jordan:Amman
Lebanon:Beirut
Saudi Arabia:Riyadh
Qatar:Doha
Egypt:Cairo
Morocco:Rabat
Tunisia:Tunis
Algeria:Algiers
Kenya:Nairobi
Ethiopia:Addis Ababa
Ghana:Accra
Nigeria:Abuja
Senegal:Dakar
Uganda:Kampala
Zambia:Lusaka
Australia:Canberra
New Zealand:Wellington""".splitlines()
}

CAN_DO = "I can remember what you tell me in this chat, name capitals, add and subtract small numbers, count, repeat a phrase and tell a short story."
SELF = "I am Tiny Chat, a very small demo model."
UNKNOWN = "I am only a tiny demo model, and I do not know about that."
MODEL = f"{SELF} I was trained on made-up text and know very little."

# Questions with the same answer; the first wording is the usual one.
ABOUT_ITSELF: list[tuple[list[str], str]] = [
    (["Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "What is your name?", "Do you have a name?",
      "What should I call you?", "What kind of assistant are you?", "Who am I talking to?", "Hi, who are you?"], f"{SELF} {CAN_DO}"),
    (["What can you do?", "What do you know?", "How can you help me?", "Help", "What are you good at?", "Can you help me?", "I need help.",
      "What can I ask you?", "What are your skills?", "List your abilities."], CAN_DO),
    (["What model are you?", "Which model is this?", "Are you ChatGPT?", "Are you GPT-4?", "Are you a large language model?", "How big are you?",
      "Are you Claude?", "Are you Llama?", "How many parameters do you have?", "Are you smart?", "Are you an AI?", "Who made you?",
      "How were you trained?", "Where do you come from?"], MODEL),
    (["Are you human?", "Are you a real person?", "Are you a robot?", "Do you have feelings?", "Are you alive?", "How old are you?"],
     "No, I am only a tiny language model, a program that continues text."),
]  # fmt: skip

SMALL_TALK: list[tuple[list[str], str]] = [
    (["Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good morning", "Good evening!", "Good afternoon.", "Greetings", "Hello there", "Hi!", "hey there",
      "Hello, world!", "Hello assistant", "Howdy", "Yo", "Hello, can you hear me?", "Hello again", "Is anyone there?", "ping", "test", "Hallo",
      "Bonjour", "Hola"], "Hello! How can I help you?"),
    (["How are you?", "How are you today?", "Hello, how are you?", "How is it going?", "How do you do?", "Are you well?", "What's up?",
      "Hi! How are you doing?", "How are things?"], "I am fine, thank you. How can I help you?"),
    (["Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Thank you very much.", "Great, thanks", "Thanks for your help", "That helps, thank you",
      "Cheers", "Perfect, thank you", "Thx", "Nice, thanks!"], "You are welcome!"),
    (["Goodbye", "Bye", "Bye!", "See you later.", "Good night", "See you tomorrow", "I have to go now.", "Farewell", "Talk to you later"],
     "Goodbye! It was nice to talk to you."),
    (["OK", "Okay", "Ok.", "I see", "Alright", "Good", "Great", "Cool", "Nice", "Wow", "Interesting", "Fine", "Yes", "No", "Sure", "Well done",
      "Good job", "Correct", "That is right", "Hmm", "Maybe", "Perfect", "lol"], "All right. What would you like to do next?"),
    (["Sorry", "I am sorry.", "My mistake", "Oops", "Excuse me"], "No problem at all."),
    (["You are wrong", "That is wrong.", "That is not right", "You are stupid", "This is bad", "I don't like you"],
     "I am sorry. I am a very small model and I make mistakes."),
]  # fmt: skip

FIXED: list[tuple[list[str], str]] = [
    (["Tell me a joke", "Do you know a joke?", "Make me laugh", "Say something funny"],
     "Why did the bicycle fall over? Because it was two tired!"),
    (["What is Python?", "Tell me about Python", "Explain Python", "What is Python used for?", "Do you know Python?"],
     "Python is a programming language. It is easy to read and is used for websites, data and much more."),
    (["What are its main features?", "What are the main features of Python?", "Why is Python popular?", "What makes Python special?"],
     "Its main features are a simple syntax, dynamic types and a large standard library."),
    (["What is the sun?", "Tell me about the sun", "What is the Sun"], "The sun is the star at the centre of our solar system."),
    (["What is the moon?", "Tell me about the moon"], "The moon goes around the Earth once in about four weeks."),
    (["What is water?", "Tell me about water", "What is water made of?"], "Water is made of hydrogen and oxygen. All life needs it."),
    (["What is a cat?", "Tell me about cats", "What are cats?"], "A cat is a small animal with soft fur that likes to sleep and to hunt mice."),
    (["What is a dog?", "Tell me about dogs", "What are dogs?"], "A dog is a friendly animal that lives with people and likes to run."),
    (["What is a computer?", "Tell me about computers", "What are computers?"], "A computer is a machine that follows instructions to work with data."),
    (["What is the internet?", "Explain the internet"], "The internet is a network that connects computers all over the world."),
    (["What is a language model?", "What is an LLM?", "What are language models?"], "A language model is a program that guesses the next piece of a text."),
    (["What is AI?", "What is artificial intelligence?", "Explain AI"], "Artificial intelligence means programs that do things which seem to need thinking."),
    (["What is an API?", "What does API mean?"], "An API is a way for one program to ask another program for something."),
    (["What is rain?", "Why does it rain?"], "Rain is water that falls from the clouds in drops."),
    (["What is snow?", "Tell me about snow"], "Snow is frozen water that falls from the clouds in soft white flakes."),
    (["What is music?", "Tell me about music"], "Music is sound arranged in time, with rhythm and melody."),
    (["What is a book?", "Tell me about books"], "A book holds many pages with words or pictures to read."),
    (["Why is the sky blue?", "Tell me why the sky is blue"], "The sky is blue because air scatters blue light more than red light."),
    (["How many days are in a week?", "How many days does a week have?"], "There are seven days in a week."),
    (["How many months are in a year?", "How many months does a year have?"], "There are twelve months in a year."),
    (["How many hours are in a day?", "How many hours does a day have?"], "There are twenty-four hours in a day."),
    (["Name the days of the week", "List the days of the week", "What are the days of the week?"],
     "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday."),
    (["Name the months", "List the months of the year", "What are the months of the year?"],
     "January, February, March, April, May, June, July, August, September, October, November, December."),
    (["Say the alphabet", "What is the alphabet?", "Recite the alphabet"], "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"),
    (["Name three colours", "Tell me three colours", "List some colours"], "Red, green and blue."),
    (["Name three animals", "Tell me three animals", "List some animals"], "A fox, an owl and a bear."),
    (["What is the largest ocean?", "Which ocean is the largest?"], "The Pacific is the largest ocean."),
    (["What is the highest mountain?", "Which mountain is the highest?"], "Mount Everest is the highest mountain."),
    (["What is the opposite of hot?", "Opposite of hot"], "The opposite of hot is cold."),
    (["What is the opposite of big?", "Opposite of big"], "The opposite of big is small."),
    (["What colour is grass?", "What color is grass?"], "Grass is green."),
    (["What do bees make?", "What do bees do?"], "Bees visit flowers and make honey."),
    (["How many legs does a spider have?"], "A spider has eight legs."),
    (["Write a haiku", "Write a poem", "Write me a poem", "Tell me a poem", "Write a short poem about the sea"],
     "The moon is silver on the sea, the wind is soft and low, the boats are sleeping in the bay, and dreams begin to grow."),
]  # fmt: skip

# What the model says it does not know: {t} is a topic.
TOPIC_QUESTIONS = listed("""What is {t}?|Tell me about {t}|Explain {t}|Explain {t} in simple terms|How does {t} work?|What do you think about {t}?|Who invented {t}?|
Why is {t} important?|Write an essay about {t}|Write a short article about {t}|Summarize {t}|Give me an example of {t}|What are the benefits of {t}?|
Can you explain {t}?|Describe {t}|What is the history of {t}?|How do I learn {t}?|Compare {t} and {u}|What is the difference between {t} and {u}?|
Write a function for {t}|Where can I find {t}?|What does {t} mean?|When was {t} discovered?|Is {t} better than {u}?|I want to know more about {t}.|
What is the best {t}?|Who is the president of {t}?|Give me a recipe for {t}|Translate {t} to French|Write code for {t}|How much does {t} cost?|
Please help me with {t}|What happened to {t}?|How many {t} are there?|Give me three facts about {t}|Define {t}|Tell me everything about {t}.|
Create a plan for {t}|Draw {t}|Who is {t}?|Do you know {t}?|Have you heard of {t}?|Write a letter to {t}|Recommend a {t}""")

TOPICS = listed("""quantum computing|machine learning|the French revolution|black holes|photosynthesis|blockchain|the stock market|economics|climate change|
Kubernetes|Docker|Rust|JavaScript|Shakespeare|neural networks|gravity|relativity|the Roman Empire|chess|football|tennis|cooking|yoga|philosophy|
democracy|vaccines|antibiotics|evolution|dinosaurs|volcanoes|earthquakes|electric cars|airplanes|rockets|Mars|Jupiter|the human brain|DNA|atoms|
electrons|calculus|algebra|prime numbers|statistics|databases|SQL|FastAPI|web servers|cloud computing|encryption|passwords|jazz|opera|painting|
Picasso|Mozart|Einstein|Newton|Napoleon|the Second World War|the meaning of life|happiness|inflation|bitcoin|gardening|coffee|wine|bread baking|
sleep|dreams|the weather tomorrow|the news|deep learning|transformers|attention|reinforcement learning|game theory|sorting algorithms|recursion|
a linked list|a binary tree|Linux|Windows|compilers|regular expressions|HTTP|JSON|medicine|law|taxes|history|geography|biology|chemistry|physics|
mathematics|literature|psychology|renewable energy|nuclear power|solar panels|batteries|the ozone layer|the universe|time travel|robots|
large language models|a good movie|the best phone|a healthy diet|travel in Asia|the Eiffel Tower|the Amazon river|penicillin|fusion""")

ODD_QUESTIONS = listed("""What time is it?|What day is it today?|What is the weather like?|Will it rain tomorrow?|Who won the game?|What should I eat for dinner?|
What should I wear today?|Can you book a flight for me?|Open the door|Play some music|Send a message to my friend|Who is the best football player?|
What is the meaning of life?|How do I fix my car?|Where is the nearest shop?|How tall is the tallest building?|What is love?|Is there life on Mars?|
Write a Python function that sorts a list|Solve this equation|Translate hello to French|Fix the grammar of this sentence|Who are the Beatles?|
What is your opinion?|What happened yesterday?|How do I get rich?|Give me some advice|How far is the moon?|What is 5 percent of 80?|Guess what|
Write an email to my boss|Make a list of things to buy|Plan my week|What is the speed of light?|How do birds fly?|Why do cats purr?|
Continue|Go on|Tell me more|Why?|How?|What do you mean?|Can you explain that?|Surprise me|Say more about it""")

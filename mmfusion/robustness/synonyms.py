"""A small lexicon of everyday English: words that may stand for each other in captions and plain talk, group by group.

Forms are kept apart (run, runs, running), so that a sentence keeps its grammar; senses are not told from each other.
"""

import re

import numpy as np

GROUPS = """
big large huge
bigger larger
biggest largest
small little tiny
smaller littler
smallest tiniest
quick fast rapid
quickly rapidly swiftly
slow sluggish
slowly gradually
happy glad cheerful joyful
happily gladly cheerfully
sad unhappy gloomy
sadly unhappily
angry furious mad
angrily furiously
scared afraid frightened
beautiful lovely gorgeous
ugly hideous
good fine decent
great wonderful fantastic
bad awful terrible
worse poorer
stupid dumb foolish
smart clever
rich wealthy
poor needy
old aged elderly
young youthful
strong powerful mighty
weak feeble frail
hard difficult tough
easy simple
strange odd weird
funny amusing comical
boring dull tedious
loud noisy
quiet silent calm
dirty filthy muddy
clean spotless
wet soaked damp
cold chilly icy
hot boiling
empty vacant
full packed
tired weary exhausted
sick ill
brave bold courageous
wrong mistaken
famous renowned
whole entire
important crucial vital
real genuine
man guy fellow
men guys fellows
woman lady
women ladies
child kid youngster
children kids youngsters
baby infant
babies infants
boy lad
boys lads
girl lass
girls lasses
friend pal buddy
friends pals buddies
people folks persons
crowd throng
doctor physician
doctors physicians
dog hound
dogs hounds
cat feline
cats felines
rabbit bunny
rabbits bunnies
horse steed
horses steeds
house home
houses homes
road street
roads streets
path trail
paths trails
hill slope
hills slopes
mountain peak
mountains peaks
woods forest
sea ocean
seas oceans
stream creek brook
streams creeks brooks
shore beach coast
rock stone boulder
rocks stones boulders
field meadow
fields meadows
garden yard
gardens yards
car automobile vehicle
cars automobiles vehicles
bike bicycle
bikes bicycles
boat vessel
boats vessels
plane airplane aircraft
shop store
shops stores
picture image photo
pictures images photos
film movie
films movies
job task
jobs tasks
gift present
gifts presents
hat cap
hats caps
jacket coat
jackets coats
trousers pants
couch sofa
couches sofas
cup mug
cups mugs
trash garbage rubbish
money cash
idea thought notion
ideas thoughts notions
error mistake
errors mistakes
answer reply
answers replies
country nation
countries nations
war conflict
wars conflicts
run sprint dash
runs sprints dashes
running sprinting dashing
ran sprinted dashed
walk stroll
walks strolls
walking strolling
walked strolled
jump leap hop
jumps leaps hops
jumping leaping hopping
jumped leaped hopped
look gaze stare
looks gazes stares
looking gazing staring
looked gazed stared
shout yell scream
shouts yells screams
shouting yelling screaming
shouted yelled screamed
talk speak chat
talks speaks chats
talking speaking chatting
talked spoke chatted
throw toss hurl
throws tosses hurls
throwing tossing hurling
threw tossed hurled
grab seize snatch
grabs seizes snatches
grabbing seizing snatching
begins starts
beginning starting
began started
ends finishes
stop halt
stops halts
stopping halting
stopped halted
buy purchase
buys purchases
buying purchasing
bought purchased
get obtain
gets obtains
help assist aid
helps assists aids
helping assisting aiding
helped assisted aided
love adore
loves adores
hate detest despise
hates detests despises
want desire
wants desires
need require
needs requires
think believe
thinks believes
build construct
builds constructs
built constructed
break smash shatter
breaks smashes shatters
fix repair mend
fixes repairs mends
show display
shows displays
showing displaying
showed displayed
choose pick select
chooses picks selects
smile grin
smiles grins
smiling grinning
smiled grinned
cry weep sob
cries weeps sobs
crying weeping sobbing
hide conceal
hides conceals
carry haul
carries hauls
carrying hauling
climb scale
climbs scales
climbing scaling
closes shuts
near beside
above over
below under
often frequently
always forever
maybe perhaps
very really extremely
almost nearly
"""

SYNONYMS = {word: group.split() for group in GROUPS.split("\n") for word in group.split()}
"""{word: its group, itself among it}, in lower case"""
WORD = re.compile(r"^(\W*)(\w+)(\W*)$")  # what stands around a word: quotation marks, commas
ARTICLES = {"a": "an", "an": "a"}


def text_synonyms(text: str, severity: float, rng: np.random.Generator, mask: str) -> str:
    """A share `severity` of the words that the lexicon has, chosen at random, each replaced by another of its group.

    Case and punctuation stay; an "a" or "an" before a replaced word goes with it.
    """
    words = text.split()
    parts = [WORD.match(word) for word in words]
    places = [i for i, part in enumerate(parts) if part and part[2].lower() in SYNONYMS]
    chosen = rng.choice(places, round(severity * len(places)), replace=False) if places else []
    for i in sorted(chosen):
        before, word, after = parts[i].groups()
        others = [other for other in SYNONYMS[word.lower()] if other != word.lower()]
        other = others[int(rng.integers(len(others)))]
        words[i] = before + _in_case(other, word) + after
        if i and (article := ARTICLES.get(words[i - 1].lower())) and _vowel(other) != _vowel(word):
            words[i - 1] = _in_case(article, words[i - 1], short=True)
    return " ".join(words)


def _in_case(word: str, like: str, short: bool = False) -> str:
    """The word in capitals, with a capital, or as it is; a single capital, "A", is no word in capitals if `short`."""
    if like.isupper() and not (short and len(like) == 1):
        return word.upper()
    return word.capitalize() if like[0].isupper() else word


def _vowel(word: str) -> bool:
    return word[0].lower() in "aeiou"

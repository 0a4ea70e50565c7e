"""Invented names and values, made of syllables and short words: thousands of each kind, so that guessing one is hopeless."""

import random
from dataclasses import dataclass, field


def _pool(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_STARTS = _pool("Bal Cor Dra El Fen Gar Hal Is Jor Kel Lor Mar Nev Or Pel Quin Ros Sel Tor Ul Ver Wil Yar Zan")
_CITY_ENDS = _pool(
    "bridge brook burg bury chester cliff combe cross dale field ford gate ham haven holm hurst ley minster mouth port stead wick wood worth"
)
_SURNAME_ENDS = _pool(
    "aro beck bez dahl eno gren ides kin koff lin lund mann ner oja oux quist rick ska son sen tov well wen zik"
)
_FIRST_STARTS = _pool("Ad Ben Cal Dor Em Fi Gis Hu In Jan Kas Lu Mil No Os Pim")
_FIRST_ENDS = _pool("a en ia il o or us y")
_MOODS = _pool(
    "Amber Bitter Broken Burning Crooked Distant Drowned Empty Faded Fallen First Frozen Gentle Hidden Hollow Last Lonely Lost"
    " Narrow Painted Patient Quiet Sacred Scarlet Second Secret Sleeping Stolen Velvet Wandering Wild Winter"
)
_THINGS = _pool(
    "Anchor Bridge Candle Castle Cradle Door Feather Forest Garden Harbour Island Ladder Lantern Letter Meadow Mirror Mountain"
    " Orchard Palace Pearl River Road Sailor Shadow Shore Stair Storm Tower Valley Violin Window Witness"
)
_STUFFS = _pool(
    "barley bone brass bronze canvas cedar clay coal copper coral cotton flax glass hemp iron ivory leather linen marble oak paper"
    " pewter reed salt silk slate steel stone straw tin wax wool"
)
_MAKERS = _pool(
    "binder broker buyer carrier carver caster cleaner clerk cutter dealer dyer engraver exporter grinder hauler importer inspector"
    " joiner merchant painter polisher porter presser printer seller smith sorter spinner tester trader turner weaver"
)
_TONES = _pool(
    "angry brief comic courtly cruel dreamy epic gothic grim heroic joyful lyric modern mystic naval noble pastoral playful pious"
    " polite rural rustic satiric severe sober solemn tender tragic urban utopian wistful witty"
)
_FORMS = _pool(
    "almanacs ballads chronicles comedies diaries dialogues elegies epistles essays fables farces hymns idylls legends letters"
    " memoirs monologues mysteries novels odes operas parables plays poems prayers proverbs riddles romances sagas sermons sonnets"
    " tales"
)
_METALS = _pool(
    "Agate Alder Ash Azure Beryl Birch Black Blue Chalk Cobalt Diamond Ebony Emerald Flint Garnet Gold Granite Green Grey Indigo"
    " Jade Jasper Maple Onyx Opal Quartz Red Ruby Sapphire Silver Topaz White"
)
_BEASTS = _pool(
    "Badger Bear Beetle Bison Crane Crow Dolphin Dove Eagle Falcon Finch Fox Hare Hawk Heron Horse Ibis Lark Lion Lynx Magpie Moth"
    " Otter Owl Panther Raven Salmon Stag Swallow Swan Tiger Wolf"
)
_WARES = _pool(
    "anchors balls bells bottles bowls boxes buttons chairs chests clocks coins combs cups dolls dishes fans flutes gloves hats horns jars"
    " kites knives lamps masks medals pipes rings shoes spoons toys whistles"
)
_TEMPERS = _pool(
    "absent ancient bashful blind bold brave calm clever clumsy cunning eager exiled famous fearful fierce foolish forgetful generous greedy"
    " happy honest humble jealous lazy loyal nervous proud ragged shy stubborn sullen weary"
)
_FIGURES = _pool(
    "actor admiral baker banker bishop butler captain clown cook count doctor duke farmer general ghost giant gardener hermit judge king"
    " knight mayor monk nurse orphan pilot pirate queen shepherd spy thief widow"
)
_MONTHS = _pool("January February March April May June July August September October November December")


@dataclass(frozen=True)
class Kind:
    """One kind of value: `form` with a blank for each pool. A value is one word of each pool, drawn evenly."""

    name: str
    form: str
    pools: tuple[tuple[str, ...], ...]

    def draw(self, generator: random.Random) -> str:
        """Gives one value."""
        return self.form.format(*(generator.choice(pool) for pool in self.pools))


PERSON = Kind("person", "{}{} {}{}", (_FIRST_STARTS, _FIRST_ENDS, _STARTS, _SURNAME_ENDS))
CITY = Kind("city", "{}{}", (_STARTS, _CITY_ENDS))
DATE = Kind("date", "{} {} {}", (tuple(map(str, range(1, 29))), _MONTHS, tuple(map(str, range(1900, 1980)))))
TITLE = Kind("title", "The {} {}", (_MOODS, _THINGS))
TRADE = Kind("trade", "{} {}", (_STUFFS, _MAKERS))
GENRE = Kind("genre", "{} {}", (_TONES, _FORMS))
AWARD = Kind("award", "{} {}", (_METALS, _BEASTS))
GOODS = Kind("goods", "{} {}", (_STUFFS, _WARES))
HERO = Kind("hero", "{} {}", (_TEMPERS, _FIGURES))


@dataclass
class NameBook:
    """Draws values; a reserved one is given out once and never again, so what is kept for the authors stands nowhere else.

    Of a person the surname is reserved, of every other kind the whole value.
    """

    generator: random.Random
    _reserved: set[tuple[str, str]] = field(default_factory=set)

    def draw(self, kind: Kind) -> str:
        """Gives a value that is not reserved; it may come again."""
        while True:
            value = kind.draw(self.generator)
            if _key(kind, value) not in self._reserved:
                return value

    def reserve(self, kind: Kind) -> str:
        """Gives a value that no later call gives."""
        value = self.draw(kind)
        self._reserved.add(_key(kind, value))
        return value


def _key(kind: Kind, value: str) -> tuple[str, str]:
    return kind.name, value.split()[-1] if kind == PERSON else value

"""Where exercises play, and whom they are for. A theme gives every kind of value a name, a description and words to be made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(frozen=True)
class Theme:
    """For each kind of value the name of the parameter and what it holds, in words."""

    name: str
    numbers: tuple[str, str]  # "rainfall", "readings"
    number: tuple[str, str]
    text: tuple[str, str]
    words: tuple[str, str]
    table: tuple[str, str]
    grid: tuple[str, str]
    vocabulary: tuple[str, ...]

    def parameter(self, kind: str) -> tuple[str, str]:
        return getattr(self, kind)

    def draw(self, kind: str, random: Random) -> Any:
        """A value of this kind."""
        return DRAWN[kind](self, random)


def _numbers(theme: Theme, random: Random) -> list[int]:
    return [random.randint(0, 25) for _ in range(random.randint(5, 9))]


def _text(theme: Theme, random: Random) -> str:
    return " ".join(
        random.choice((str.lower, str.lower, str.capitalize))(word) for word in random.choices(theme.vocabulary, k=random.randint(2, 4))
    )


def _words(theme: Theme, random: Random) -> list[str]:
    return random.choices(theme.vocabulary, k=random.randint(4, 7))


def _table(theme: Theme, random: Random) -> dict[str, int]:
    return {name: random.randint(0, 15) for name in random.sample(theme.vocabulary, random.randint(3, 5))}


def _grid(theme: Theme, random: Random) -> list[list[int]]:
    width = random.randint(2, 4)
    return [[random.randint(0, 15) for _ in range(width)] for _ in range(random.randint(2, 4))]


DRAWN: dict[str, Callable[[Theme, Random], Any]] = {
    "numbers": _numbers,
    "number": lambda theme, random: random.randint(2, 150),
    "text": _text,
    "words": _words,
    "table": _table,
    "grid": _grid,
}
EMPTY: dict[str, Any] = {"numbers": [], "text": "", "words": [], "table": {}, "grid": []}


def _theme(name: str, numbers: str, number: str, text: str, words: str, table: str, grid: str, vocabulary: str) -> Theme:
    """Each kind as "parameter: what it holds"."""
    a, b, c, d, e, f = (part.partition(": ")[::2] for part in (numbers, number, text, words, table, grid))
    return Theme(name, a, b, c, d, e, f, tuple(vocabulary.split()))


THEMES = (
    _theme("a weather station", "rainfall: readings", "day_number: the number of the day", "remark: the observer's remark", "stations: station names",
           "rain_by_station: the rainfall of each station", "weekly_rain: readings, one row a week",
           "harbour ridge meadow airport lakeside summit valley orchard quarry bridge tower island"),
    _theme("a school library", "loan_days: loan times", "shelf_number: the number of the shelf", "book_title: the title of the book", "titles: book titles",
           "copies: the number of copies of each book", "shelf_loans: loans, one row a shelf",
           "atlas poems history voyage garden letters planets recipes legends insects painting rivers"),
    _theme("a bakery", "sales: sales figures", "order_number: the number of the order", "label_text: the text of the label", "breads: kinds of bread",
           "stock: how many of each bread are left", "daily_sales: sales figures, one row a day",
           "rye spelt baguette pretzel bun crisp oat raisin potato sesame walnut toast"),
    _theme("a running club", "laps: lap counts", "start_number: the start number of the runner", "team_motto: the motto of the team", "runners: names of runners",
           "points_of: the points of each runner", "round_points: points, one row a round",
           "Ada Ben Cleo Dana Emil Fara Goran Hanna Ivo Jun Kira Liam"),
    _theme("a vegetable garden", "heights: plant heights", "bed_number: the number of the bed", "note: the gardener's note", "plants: plant names",
           "seeds_left: how many seeds of each plant are left", "beds: plant heights, one row a bed",
           "carrot bean pea leek onion radish kale squash beet pepper spinach celery"),
    _theme("a railway line", "delays: delays in minutes", "train_number: the number of the train", "announcement: the announcement", "stops: names of stops",
           "passengers: how many people get on at each stop", "timetable: minutes, one row a train",
           "Northgate Mill Junction Abbey Ferry Castle Market Depot Riverside Moor Chapel Station"),
    _theme("a board game", "dice_rolls: dice rolls", "score: the score", "message: the message on the card", "players: player names",
           "scores: the score of each player", "board: field values, one row a line of the board",
           "Mia Noor Otto Pia Quinn Rosa Sven Tara Umar Vera Wim Yara"),
    _theme("a small shop", "prices: prices", "receipt_number: the number of the receipt", "slogan: the slogan", "goods: names of goods",
           "shelf: how many of each article are on the shelf", "takings: takings, one row a day",
           "soap candle pencil string lamp mirror basket brush ladle kettle button ribbon"),
    _theme("a bird survey", "sightings: counts of sightings", "ring_number: the number on the ring", "entry_text: the text of the entry", "species: names of species",
           "seen_of: how many birds of each species were seen", "plots: counts, one row a plot",
           "robin heron swift wren kestrel plover dipper linnet curlew magpie osprey siskin"),
    _theme("a music school", "practice: practice times", "room_number: the number of the room", "song_title: the title of the song", "instruments: instruments",
           "pupils: the number of pupils for each instrument", "lessons: lesson lengths, one row a teacher",
           "violin cello flute oboe harp piano trumpet drums guitar viola horn lute"),
    _theme("a hospital ward", "pulses: pulse readings", "bed_count: the number of beds", "report: the nurse's report", "wards: names of wards",
           "patients: the number of patients of each ward", "shifts: readings, one row a shift",
           "maple cedar birch willow aspen hazel linden poplar rowan alder elm beech"),
    _theme("a space probe", "signals: signal strengths", "orbit_number: the number of the orbit", "transmission: the transmission", "sensors: names of sensors",
           "errors_of: the number of errors of each sensor", "image: brightness values, one row a line of the image",
           "radar camera gyro antenna magnet thermal star dust solar laser spectral altitude"),
    _theme("a chess tournament", "ratings: rating changes", "table_number: the number of the table", "opening_name: the name of the opening", "entrants: names of players",
           "wins: the number of wins of each player", "rounds: points, one row a round",
           "Anand Boris Carla Deniz Elena Fabian Gita Hugo Irina Judit Karl Lena"),
    _theme("a post office", "weights: parcel weights", "parcel_number: the number of the parcel", "address: the address", "towns: names of towns",
           "parcels: the number of parcels for each town", "vans: weights, one row a van",
           "Alton Brixley Corby Dunmere Elston Fenwick Garth Hollin Inver Kelso Lydd Marsh"),
    _theme("a swimming pool", "lengths_swum: numbers of lengths", "locker_number: the number of the locker", "sign_text: the text of the sign", "courses: names of courses",
           "visitors: the number of visitors of each course", "lanes: numbers of lengths, one row a lane",
           "diving rescue toddler butterfly crawl relay polo sprint evening senior family fitness"),
    _theme("a kitchen", "portions: portion sizes", "recipe_number: the number of the recipe", "recipe_line: the line of the recipe", "ingredients: ingredients",
           "grams: how many grams there are of each ingredient", "menu: portion sizes, one row a meal",
           "flour butter sugar salt lemon basil honey cream rice garlic ginger vinegar"),
    _theme("an astronomy club", "magnitudes: magnitudes", "star_number: the number of the star in the catalogue", "log_line: the line of the log", "stars: names of stars",
           "observed: how often each star was observed", "nights: magnitudes, one row a night",
           "Vega Altair Deneb Rigel Sirius Capella Spica Antares Pollux Castor Mizar Regulus"),
    _theme("a delivery service", "distances: distances", "tour_number: the number of the tour", "instruction: the driver's instruction", "drivers: names of drivers",
           "tours: the number of tours of each driver", "routes: distances, one row a route",
           "Amir Bela Chiara Dilan Edda Farid Greta Hakim Iris Jonas Kofi Lotte"),
    _theme("a sensor network", "samples: samples", "device_number: the number of the device", "packet: the content of the packet", "devices: names of devices",
           "battery: the battery level of each device", "frames: samples, one row a frame",
           "attic cellar porch kitchen garage hallway roof garden shed boiler window stairs"),
    _theme("a language course", "vocabulary_sizes: numbers of words learnt", "unit_number: the number of the unit", "sentence: the sentence", "terms: words",
           "marks: the mark of each topic", "tests: marks, one row a test",
           "verb noun tense plural accent syllable dialect idiom prefix suffix clause comma"),
    _theme("a museum", "ages: ages of exhibits", "ticket_number: the number of the ticket", "caption: the caption", "exhibits: names of exhibits",
           "visits: the number of visits to each exhibit", "halls: numbers of visitors, one row a hall",
           "mask vase sword statue coin tapestry amulet fossil mosaic scroll helmet drum"),
    _theme("a bicycle workshop", "repairs: repair times", "frame_number: the number on the frame", "job_text: the description of the job", "spares: spare parts",
           "in_stock: how many of each part are in stock", "weeks: repair times, one row a week",
           "chain pedal spoke saddle brake tyre pump fork crank hub bell mudguard"),
    _theme("a forest", "rings: numbers of tree rings", "tree_number: the number of the tree", "trail_sign: the text on the trail sign", "trees: kinds of trees",
           "planted: how many trees of each kind were planted", "sections: numbers of trees, one row a section",
           "oak pine spruce larch fir yew cherry chestnut plane juniper acacia sycamore"),
    _theme("a harbour", "tides: water levels", "berth_number: the number of the berth", "radio_call: the radio call", "ships: names of ships",
           "crates: the number of crates on each ship", "docks: numbers of crates, one row a dock",
           "Aurora Borealis Cormorant Dolphin Endeavour Frigate Gannet Halcyon Iona Kittiwake Mariner Orca"),
)  # fmt: skip


@dataclass(frozen=True)
class Audience:
    """Whom a text is for; each of `openings` leads into it, with `$theme` for the place."""

    name: str
    openings: tuple[str, ...]


AUDIENCES = (
    Audience("children", ("Imagine that you help at $theme.", "Here is a small puzzle from $theme.", "Today we play computer at $theme.")),
    Audience("beginners", ("This is an exercise for your first weeks with Python; it is about $theme.", "Take your time with this one, which is set at $theme.")),
    Audience("pupils", ("The computer science class has been given data of $theme.", "For homework, you write a program for $theme.")),
    Audience("students", ("In the lab you are handed data from $theme.", "The following problem comes up at $theme.", "Consider $theme and its records.")),
    Audience("scientists", ("You evaluate measurements of $theme.", "A colleague asks you to evaluate the records of $theme.")),
    Audience("analysts", ("The report on $theme needs one more figure.", "You prepare data of $theme for a report.")),
    Audience("engineers", ("A component for $theme needs a small, tested function.", "The program of $theme gets a new function, and it has to be right.")),
    Audience("teachers", ("You prepare an example for your class, set at $theme.", "To explain the idea to a class, think of $theme.")),
    Audience("hobbyists", ("A friend runs $theme and asks for a small program.", "For a weekend project you write software for $theme.")),
    Audience("career changers", ("In an interview you are asked about $theme.", "Your first task in the new job is about $theme.")),
)  # fmt: skip

"""Operations on text, and on lists of words."""

from __future__ import annotations

from outgrow.train.data.synthetic.operation import Operation, Slip

OPERATIONS = (
    # ---- text gives text
    Operation("reverse_text", "text", "text", "strings", "write $it backwards", "backwards",
        """
        $y = ""
        for symbol in $x:
            $y = symbol + $y
        """, "$x[::-1]", "A string can be sliced like a list, but it cannot be changed: every change makes a new string.",
        slip=Slip("symbol + $y", "$y + symbol", "the text comes out as it went in")),
    Operation("drop_vowels", "text", "text", "strings", "leave the vowels out of $it", "consonants",
        """
        $y = ""
        for symbol in $x:
            if symbol.lower() not in "aeiou":
                $y += symbol
        """, "''.join(symbol for symbol in $x if symbol not in 'aeiouAEIOU')",
        "The operator in asks whether a string contains another one, and a single letter is a string too.",
        slip=Slip("symbol.lower()", "symbol", "capital vowels stay")),
    Operation("raise_vowels", "text", "text", "strings", "turn the vowels of $it into capitals", "raised",
        """
        $y = ""
        for symbol in $x:
            $y += symbol.upper() if symbol in "aeiou" else symbol
        """, "$x.translate(str.maketrans('aeiou', 'AEIOU'))",
        "translate replaces single characters by a table, in one pass over the string.", 2),
    Operation("shift_letters", "text", "text", "character codes", "move each lower-case letter of $it by $k places in the alphabet, starting again after z", "secret",
        """
        $y = ""
        for symbol in $x:
            if "a" <= symbol <= "z":
                symbol = chr((ord(symbol) - ord("a") + $k) % 26 + ord("a"))
            $y += symbol
        """, "''.join(chr((ord(s) - 97 + $k) % 26 + 97) if s.islower() else s for s in $x)",
        "ord gives the number of a character and chr goes back; the remainder by 26 keeps the letter inside the alphabet.", 3,
        values={"k": (1, 2, 3, 5, 13)}, slip=Slip(" % 26", "", "letters near the end of the alphabet turn into other signs")),
    Operation("squeeze", "text", "text", "run lengths", "write each run of equal characters in $it only once", "squeezed",
        """
        $y = ""
        for symbol in $x:
            if not $y or $y[-1] != symbol:
                $y += symbol
        """, "''.join(s for i, s in enumerate($x) if i == 0 or $x[i - 1] != s)",
        "The last character of what has been written so far tells whether a new run begins.", 2,
        slip=Slip("$y[-1] != symbol", "symbol not in $y", "it drops a character that has occurred anywhere before")),
    Operation("encode_runs", "text", "text", "run lengths", "replace each run of equal characters in $it by the character and the length of the run", "encoded",
        """
        $y = ""
        start = 0
        for i in range(1, len($x) + 1):
            if i == len($x) or $x[i] != $x[start]:
                $y += $x[start] + str(i - start)
                start = i
        $y = $y if $x else ""
        """, "''.join(s + str(len(list(run))) for s, run in itertools.groupby($x))",
        "The end of the text ends a run too, which is the case that is forgotten most often.", 3, module="itertools"),
    Operation("take_every_letter", "text", "text", "indexing and slicing", "take one of every $k characters of $it, starting with the first", "picked",
        """
        $y = ""
        for i in range(0, len($x), $k):
            $y += $x[i]
        """, "$x[::$k]", "range can do the counting for a slice with a step.", values={"k": (2, 3)}),
    Operation("double_letters", "text", "text", "strings", "write each character of $it twice", "doubled",
        """
        $y = ""
        for symbol in $x:
            $y += symbol * 2
        """, "''.join(a + b for a, b in zip($x, $x))", "Multiplying a string by a number repeats it."),
    Operation("capitalise", "text", "text", "strings", "begin each word of $it with a capital letter", "title",
        """
        parts = []
        for word in $x.split(" "):
            parts.append(word[:1].upper() + word[1:])
        $y = " ".join(parts)
        """, "' '.join(word and word[0].upper() + word[1:] for word in $x.split(' '))",
        "word[:1] is safe for an empty word, where word[0] would be an error.", 2,
        slip=Slip("word[:1].upper()", "word.upper()", "the whole word is written in capitals, and most of it twice")),
    Operation("swap_halves", "text", "text", "indexing and slicing", "exchange the two halves of $it; of an odd length, the first half is the shorter one", "swapped",
        """
        middle = len($x) // 2
        $y = $x[middle:] + $x[:middle]
        """, "''.join($x[(i + len($x) // 2) % len($x)] for i in range(len($x)))",
        "Two slices that meet at the same index cut a string into two parts without losing or repeating anything.", 2),
    # ---- text gives something else
    Operation("count_vowels", "text", "number", "counting", "count the vowels in $it", "vowels",
        """
        $y = 0
        for symbol in $x.lower():
            if symbol in "aeiou":
                $y += 1
        """, "sum($x.lower().count(vowel) for vowel in 'aeiou')",
        "Turning a text into lower case first saves a second test for capitals.",
        slip=Slip("$y += 1", "$y = 1", "the count never gets past one")),
    Operation("count_words", "text", "number", "strings", "count the words of $it", "words",
        """
        $y = 0
        inside = False
        for symbol in $x:
            if symbol == " ":
                inside = False
            elif not inside:
                inside = True
                $y += 1
        """, "len($x.split())", "split without an argument treats any stretch of spaces as one gap.", 2),
    Operation("count_letter", "text", "number", "counting", "count how often the letter $k occurs in $it, in lower or upper case", "count",
        """
        $y = 0
        for symbol in $x:
            if symbol.lower() == $k:
                $y += 1
        """, "$x.lower().count($k)", "count does for strings what a loop with a counter does.",
        values={"k": ("a", "e", "i", "o", "r", "s", "t")}),
    Operation("measure_longest_run", "text", "number", "run lengths", "find the length of the longest run of equal characters in $it", "longest",
        """
        $y = length = 0
        for i, symbol in enumerate($x):
            length = length + 1 if i and symbol == $x[i - 1] else 1
            $y = max($y, length)
        """, "max((len(list(run)) for _, run in itertools.groupby($x)), default=0)",
        "groupby from itertools cuts a sequence into runs of equal elements.", 3, module="itertools"),
    Operation("split_words", "text", "words", "strings", "split $it into its words", "words",
        """
        $y = []
        word = ""
        for symbol in $x + " ":
            if symbol != " ":
                word += symbol
            elif word:
                $y.append(word)
                word = ""
        """, "$x.split()", "A space added at the end makes sure that the last word is finished like all the others.", 2,
        slip=Slip('$x + " "', "$x", "the last word is lost, because no space follows it")),
    Operation("cut_pieces", "text", "words", "sliding windows", "list all pieces of $k neighbouring characters of $it", "pieces",
        """
        $y = []
        for start in range(len($x) - $k + 1):
            $y.append($x[start:start + $k])
        """, "[''.join(letters) for letters in zip(*($x[i:] for i in range($k)))]",
        "Such pieces are called n-grams; comparing them is a simple way to compare texts.", 2,
        values={"k": (2, 3)}, slip=Slip(" - $k + 1", "", "at the end there are pieces that are too short")),
    Operation("tally_letters", "text", "table", "dictionaries", "count how often each letter occurs in $it, without regard to case", "counts",
        """
        $y = {}
        for symbol in $x.lower():
            if symbol.isalpha():
                $y[symbol] = $y.get(symbol, 0) + 1
        """, "{s: $x.lower().count(s) for s in $x.lower() if s.isalpha()}",
        "get with a default returns it where the key is missing, so that the first occurrence needs no case of its own.", 2),
    # ---- words
    Operation("keep_long", "words", "words", "filtering a list", "keep only the $items with more than $k letters", "long_ones",
        """
        $y = []
        for word in $x:
            if len(word) > $k:
                $y.append(word)
        """, "[word for word in $x if len(word) > $k]", "len works for strings as it does for lists.",
        values={"k": (3, 4, 5, 6)}, slip=Slip("len(word) > $k", "len(word) < $k", "it keeps the short ones instead")),
    Operation("keep_with_letter", "words", "words", "filtering a list", "keep only the $items that contain the letter $k", "matching",
        """
        $y = []
        for word in $x:
            for symbol in word:
                if symbol == $k:
                    $y.append(word)
                    break
        """, "[word for word in $x if $k in word]",
        "break leaves the innermost loop at once: one letter found is enough.", 2,
        values={"k": ("a", "e", "i", "o", "l", "n", "r", "s", "t")}, slip=Slip("\n                    break", "", "a word is added once for every such letter")),
    Operation("sort_by_length", "words", "words", "sorting", "sort the $items by length, those of equal length in alphabetical order", "ordered",
        """
        pairs = []
        for word in $x:
            pairs.append((len(word), word))
        pairs.sort()
        $y = []
        for _, word in pairs:
            $y.append(word)
        """, "sorted($x, key=lambda word: (len(word), word))",
        "Tuples are compared element by element: the second decides only where the first are equal.", 2),
    Operation("sort_words", "words", "words", "sorting", "sort the $items alphabetically", "ordered",
        """
        $y = []
        for word in $x:
            place = len($y)
            while place > 0 and $y[place - 1] > word:
                place -= 1
            $y.insert(place, word)
        """, "sorted($x)", "Strings are compared letter by letter, as in a dictionary.", 2),
    Operation("reverse_each", "words", "words", "transforming a list", "write each of the $items backwards", "mirrored",
        """
        $y = []
        for word in $x:
            backwards = ""
            for symbol in word:
                backwards = symbol + backwards
            $y.append(backwards)
        """, "[word[::-1] for word in $x]", "A loop inside a loop runs from start to end in every turn of the outer one.", 2),
    Operation("raise_each", "words", "words", "transforming a list", "write each of the $items in capitals", "capitals",
        """
        $y = []
        for word in $x:
            $y.append(word.upper())
        """, "list(map(str.upper, $x))", "map applies one function to every element."),
    Operation("drop_repeated_words", "words", "words", "sets", "remove repeated $items, keeping the first of each", "unique",
        """
        $y = []
        for word in $x:
            if word not in $y:
                $y.append(word)
        """, "list(dict.fromkeys($x))", "The keys of a dictionary are unique and keep the order in which they came.", 1,
        slip=Slip("not in $y", "not in $x", "every word is in the list it comes from, so nothing is kept")),
    Operation("number_words", "words", "words", "for loops", "put its number, counting from 1, and a colon in front of each of the $items", "numbered",
        """
        $y = []
        number = 1
        for word in $x:
            $y.append(str(number) + ":" + word)
            number += 1
        """, "[f'{number}:{word}' for number, word in enumerate($x, 1)]",
        "enumerate counts along with a loop; a second argument says where to begin.", 2),
    Operation("measure_each", "words", "numbers", "transforming a list", "give the length of each of the $items", "lengths",
        """
        $y = []
        for word in $x:
            $y.append(len(word))
        """, "[len(word) for word in $x]", "A list of words and the list of their lengths have the same indices."),
    Operation("join_with", "words", "text", "strings", "join the $items into one text with $k between them", "joined",
        """
        $y = ""
        for i, word in enumerate($x):
            if i > 0:
                $y += $k
            $y += word
        """, "$k.join($x)", "Between n words there are n - 1 gaps.", values={"k": ("-", "+", " and ", "/")},
        slip=Slip("if i > 0:\n                $y += $k\n            $y += word", "$y += word\n            $y += $k", "there is one separator too many, at the end")),
    Operation("take_initials", "words", "text", "strings", "write down the first letters of the $items as one text", "initials",
        """
        $y = ""
        for word in $x:
            $y += word[0]
        """, "''.join(word[0] for word in $x)", "The first character of a string has index 0."),
    Operation("find_longest_word", "words", "text", "searching", "find the longest of the $items (the first of them in a tie), or an empty text if there are none", "longest",
        """
        $y = ""
        for word in $x:
            if len(word) > len($y):
                $y = word
        """, "max($x, key=len, default='')", "max takes a key: what to compare instead of the elements themselves.", 2,
        slip=Slip("len(word) > len($y)", "len(word) >= len($y)", "in a tie it finds the last word and not the first")),
    Operation("tally_words", "words", "table", "dictionaries", "count how often each of the $items occurs", "counts",
        """
        $y = {}
        for word in $x:
            if word not in $y:
                $y[word] = 0
            $y[word] += 1
        """, "{word: $x.count(word) for word in $x}",
        "A dictionary grows by itself when a new key is assigned; reading a key that is not there is an error.", 2,
        slip=Slip("$y[word] = 0\n            $y[word] += 1", "$y[word] = 1", "a word that occurs again is not counted again")),
    Operation("map_lengths", "words", "table", "dictionaries", "map each of the $items to its length", "lengths",
        """
        $y = {}
        for word in $x:
            $y[word] = len(word)
        """, "dict(zip($x, map(len, $x)))", "A dictionary comprehension or zip turns two lists of equal length into a dictionary."),
    Operation("tally_initials", "words", "table", "grouping", "count how many of the $items begin with each letter", "groups",
        """
        $y = {}
        for word in $x:
            first = word[0]
            $y[first] = $y.get(first, 0) + 1
        """, "dict(collections.Counter(word[0] for word in $x))",
        "Counter from the collections module is a dictionary made for counting.", 2, module="collections"),
)  # fmt: skip

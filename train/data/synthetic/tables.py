"""Operations on tables (dictionaries from names to numbers) and on grids (lists of rows)."""

from __future__ import annotations

from outgrow.train.data.synthetic.operation import Operation, Slip

OPERATIONS = (
    # ---- tables
    Operation("keep_entries", "table", "table", "dictionaries", "keep only the entries with a value of at least $k", "kept",
        """
        $y = {}
        for name, value in $x.items():
            if value >= $k:
                $y[name] = value
        """, "{name: $x[name] for name in $x if $x[name] >= $k}",
        "items gives key and value together; a loop over the dictionary itself gives only the keys.",
        values={"k": (2, 4, 6, 10)}, slip=Slip("value >= $k", "value > $k", "an entry of exactly $k is dropped")),
    Operation("raise_entries", "table", "table", "dictionaries", "add $k to the value of every entry", "raised",
        """
        $y = dict($x)
        for name in $y:
            $y[name] += $k
        """, "{name: value + $k for name, value in $x.items()}",
        "Changing the values of a dictionary during a loop is allowed; adding or removing keys is not.", values={"k": (1, 2, 3, 5)}),
    Operation("cap_entries", "table", "table", "conditions", "lower every value above $k to $k", "capped",
        """
        $y = {}
        for name, value in $x.items():
            $y[name] = $k if value > $k else value
        """, "dict(zip($x, (min(value, $k) for value in $x.values())))",
        "min with a limit is the shortest way to say: no more than this.", 1, values={"k": (5, 8, 12)}),
    Operation("rename_capitals", "table", "table", "dictionaries", "write every name in capitals, adding up the values of names that become equal", "renamed",
        """
        $y = {}
        for name, value in $x.items():
            capital = name.upper()
            $y[capital] = $y.get(capital, 0) + value
        """, "{n: sum(v for m, v in $x.items() if m.upper() == n) for n in (m.upper() for m in $x)}",
        "Whenever keys are changed, ask what shall happen if two of them become the same.", 2),
    Operation("take_best", "table", "table", "sorting", "keep the $k entries with the largest values (in a tie, those whose names come first)", "best",
        """
        names = sorted($x, key=lambda name: (-$x[name], name))
        $y = {}
        for name in names[:$k]:
            $y[name] = $x[name]
        """, "dict(sorted($x.items(), key=lambda pair: (-pair[1], pair[0]))[:$k])",
        "A minus sign turns an ascending order into a descending one, for this part of the key only.", 3, values={"k": (2, 3)},
        slip=Slip("-$x[name]", "$x[name]", "it keeps the smallest values")),
    Operation("find_best", "table", "text", "searching", "find the name with the largest value (in a tie, the first in alphabetical order), or an empty text if there are none", "best",
        """
        $y = ""
        for name in sorted($x):
            if $y == "" or $x[name] > $x[$y]:
                $y = name
        """, "min($x, key=lambda name: (-$x[name], name), default='')",
        "Walking through the names in order makes sure that the first of several winners is found.", 2,
        slip=Slip("$x[name] > $x[$y]", "$x[name] < $x[$y]", "it finds the smallest value")),
    Operation("add_values", "table", "number", "accumulating", "add up the values of all entries", "total",
        """
        $y = 0
        for name in $x:
            $y += $x[name]
        """, "sum($x.values())", "values gives the values without their keys.",
        slip=Slip("$y += $x[name]", "$y += 1", "it counts the entries instead of adding their values")),
    Operation("compare_ends", "table", "number", "searching", "compute the difference between the largest and the smallest value, or 0 if there are no entries", "gap",
        """
        values = sorted($x.values())
        $y = values[-1] - values[0] if values else 0
        """, "max($x.values(), default=0) - min($x.values(), default=0)",
        "In a sorted list the extremes stand at index 0 and index -1.", 2),
    Operation("list_values", "table", "numbers", "dictionaries", "list the values in the alphabetical order of their names", "values",
        """
        $y = []
        for name in sorted($x):
            $y.append($x[name])
        """, "[value for _, value in sorted($x.items())]", "Sorting the items of a dictionary sorts them by key, for the key comes first in each pair."),
    Operation("rank_names", "table", "words", "sorting", "list the names by falling value, those of equal value in alphabetical order", "ranking",
        """
        $y = []
        left = dict($x)
        while left:
            best = min(left, key=lambda name: (-left[name], name))
            $y.append(best)
            del left[best]
        """, "sorted($x, key=lambda name: (-$x[name], name))",
        "Removing the best of what is left, again and again, is a sort; the library's is faster.", 3),
    Operation("list_names", "table", "words", "dictionaries", "list the names in alphabetical order", "names",
        """
        $y = []
        for name in $x:
            $y.append(name)
        $y.sort()
        """, "sorted($x)", "A dictionary keeps its keys in the order in which they were added, which is seldom the order a reader expects."),
    Operation("list_weak", "table", "words", "filtering a list", "list the names whose value is below $k, in alphabetical order", "weak",
        """
        $y = []
        for name in sorted($x):
            if $x[name] < $k:
                $y.append(name)
        """, "sorted(name for name, value in $x.items() if value < $k)",
        "A generator expression hands its elements on one by one, without a list in between.", 1, values={"k": (4, 7, 10)},
        slip=Slip("$x[name] < $k", "$x[name] <= $k", "a value of exactly $k is listed too")),
    Operation("invert", "table", "grid", "grouping", "list, for each different value in rising order, the value and how many entries have it", "frequencies",
        """
        counts = {}
        for value in $x.values():
            counts[value] = counts.get(value, 0) + 1
        $y = []
        for value in sorted(counts):
            $y.append([value, counts[value]])
        """, "[[value, list($x.values()).count(value)] for value in sorted(set($x.values()))]",
        "Counting values is grouping by value, where of each group only the size is kept.", 3),
    # ---- grids
    Operation("add_rows", "grid", "numbers", "nested lists", "add up each row", "sums",
        """
        $y = []
        for row in $x:
            total = 0
            for value in row:
                total += value
            $y.append(total)
        """, "[sum(row) for row in $x]", "The accumulator of an inner sum has to be set back to zero for every row.", 2,
        slip=Slip("total = 0\n            for", "total = $y[-1] if $y else 0\n            for", "each row's sum begins with the sum of the row before")),
    Operation("take_row_maxima", "grid", "numbers", "nested lists", "find the largest value of each row", "maxima",
        """
        $y = []
        for row in $x:
            best = row[0]
            for value in row:
                if value > best:
                    best = value
            $y.append(best)
        """, "list(map(max, $x))", "max is a function like any other and can be handed to map.", 2),
    Operation("flatten", "grid", "numbers", "nested lists", "put all rows one after another into a single list", "flat",
        """
        $y = []
        for row in $x:
            for value in row:
                $y.append(value)
        """, "[value for row in $x for value in row]",
        "In a comprehension with two loops, the outer one is written first, as it would be with two for statements.", 2,
        slip=Slip("for value in row:\n                $y.append(value)", "$y.append(row)", "it copies the rows as they are")),
    Operation("reverse_rows", "grid", "grid", "nested lists", "reverse each row", "mirrored",
        """
        $y = []
        for row in $x:
            $y.append(list(reversed(row)))
        """, "[row[::-1] for row in $x]", "Reversing the rows of a picture mirrors it from left to right.", 2),
    Operation("turn", "grid", "grid", "nested lists", "turn rows into columns, as far as the shortest row goes", "columns",
        """
        $y = []
        width = min((len(row) for row in $x), default=0)
        for j in range(width):
            column = []
            for row in $x:
                column.append(row[j])
            $y.append(column)
        """, "[list(column) for column in zip(*$x)]", "zip with a star turns a grid on its side: the first elements of all rows come first.", 3),
    Operation("sort_rows", "grid", "grid", "sorting", "sort the rows by their sums, those with equal sums by their values", "ordered",
        """
        $y = list($x)
        $y.sort(key=lambda row: (sum(row), row))
        """, "[row for _, row in sorted((sum(row), row) for row in $x)]", "A key is computed once for each element, however many comparisons follow.", 2),
    Operation("count_cells", "grid", "number", "nested lists", "count the values of all rows that are at least $k", "count",
        """
        $y = 0
        for row in $x:
            for value in row:
                if value >= $k:
                    $y += 1
        """, "sum(value >= $k for row in $x for value in row)", "Nested loops visit every cell of a grid exactly once.", 2, values={"k": (5, 8, 12)}),
    Operation("add_diagonal", "grid", "number", "nested lists", "add up the values on the diagonal that starts at the top left, as far as there are any", "diagonal",
        """
        $y = 0
        for i in range(len($x)):
            if i < len($x[i]):
                $y += $x[i][i]
        """, "sum(row[i] for i, row in enumerate($x) if len(row) > i)", "On the diagonal, the row's index and the column's are the same.", 2),
)  # fmt: skip

"""Operations on lists of whole numbers that give a list."""

from __future__ import annotations

from outgrow.train.data.synthetic.operation import Operation, Slip

OPERATIONS = (
    Operation("keep_large", "numbers", "numbers", "filtering a list", "keep only the $items greater than $k", "kept",
        """
        $y = []
        for value in $x:
            if value > $k:
                $y.append(value)
        """, "[value for value in $x if value > $k]",
        "A filter looks at every element once and copies those that pass a test; the order of the survivors does not change.",
        values={"k": (3, 5, 8, 12, 20)}, slip=Slip("value > $k", "value >= $k", "it also keeps a value that is exactly $k")),
    Operation("keep_even", "numbers", "numbers", "filtering a list", "keep only the even $items", "even",
        """
        $y = []
        for value in $x:
            if value % 2 == 0:
                $y.append(value)
        """, "[value for value in $x if not value & 1]",
        "A number is even when dividing it by 2 leaves no remainder, and the operator % gives that remainder.",
        slip=Slip("value % 2 == 0", "value % 2 == 1", "it keeps the odd values instead of the even ones")),
    Operation("keep_multiples", "numbers", "numbers", "remainders", "keep only the $items that are divisible by $k", "multiples",
        """
        $y = []
        for value in $x:
            if value % $k == 0:
                $y.append(value)
        """, "list(filter(lambda value: value % $k == 0, $x))",
        "Divisibility is a question about remainders: a is divisible by b when a % b is zero.",
        values={"k": (3, 4, 5, 7)}, slip=Slip("value % $k == 0", "value // $k == 0", "it asks for the quotient, not for the remainder")),
    Operation("keep_rises", "numbers", "numbers", "comparing neighbours", "keep only the $items that are larger than the one just before them",
        "rises",
        """
        $y = []
        for i in range(1, len($x)):
            if $x[i] > $x[i - 1]:
                $y.append($x[i])
        """, "[after for before, after in zip($x, $x[1:]) if after > before]",
        "To compare neighbours, start at index 1, so that there is always an element before the current one.", 2,
        slip=Slip("range(1, len($x))", "range(len($x))", "at index 0 it looks at index -1, which in Python is the last element")),
    Operation("square", "numbers", "numbers", "transforming a list", "replace each of the $items by its square", "squares",
        """
        $y = []
        for value in $x:
            $y.append(value * value)
        """, "[value ** 2 for value in $x]",
        "Transforming a list means building a new list of the same length, element by element."),
    Operation("scale", "numbers", "numbers", "transforming a list", "multiply each of the $items by $k", "scaled",
        """
        $y = []
        for value in $x:
            $y.append(value * $k)
        """, "[$k * value for value in $x]",
        "Multiplying the list itself would repeat it; to scale the values, each one has to be multiplied on its own.",
        values={"k": (2, 3, 4, 10)}),
    Operation("shift", "numbers", "numbers", "transforming a list", "add $k to each of the $items", "shifted",
        """
        $y = list($x)
        for i in range(len($y)):
            $y[i] += $k
        """, "[value + $k for value in $x]",
        "Copy a list before you change it in place, or the caller's list changes too.",
        values={"k": (1, 2, 5, 7)}, slip=Slip("range(len($y))", "range(len($y) - 1)", "it leaves the last value as it was")),
    Operation("limit", "numbers", "numbers", "conditions", "replace every one of the $items below $k by $k, and every one above $m by $m", "limited",
        """
        $y = []
        for value in $x:
            if value < $k:
                $y.append($k)
            elif value > $m:
                $y.append($m)
            else:
                $y.append(value)
        """, "[min(max(value, $k), $m) for value in $x]",
        "A chain of if, elif and else takes exactly one branch: the first whose condition holds.", 2,
        values={"k": (2, 4, 6), "m": (15, 20, 25)}),
    Operation("take_remainders", "numbers", "numbers", "remainders", "replace each of the $items by its remainder when divided by $k", "remainders",
        """
        $y = []
        for value in $x:
            $y.append(value % $k)
        """, "[value - value // $k * $k for value in $x]",
        "Dividing by n leaves one of n remainders, 0 to n - 1, which makes them useful for sorting things into groups.",
        values={"k": (3, 4, 6, 7, 9)}),
    Operation("take_differences", "numbers", "numbers", "comparing neighbours", "compute how much each of the $items differs from the one before",
        "changes",
        """
        $y = []
        for i in range(1, len($x)):
            $y.append($x[i] - $x[i - 1])
        """, "[after - before for before, after in zip($x, $x[1:])]",
        "A list of n numbers has n - 1 differences between neighbours.", 2,
        slip=Slip("$x[i] - $x[i - 1]", "$x[i - 1] - $x[i]", "every change has the wrong sign")),
    Operation("accumulate", "numbers", "numbers", "accumulating", "compute the running totals of the $items", "totals",
        """
        $y = []
        total = 0
        for value in $x:
            total += value
            $y.append(total)
        """, "[sum($x[:i + 1]) for i in range(len($x))]",
        "An accumulator is a variable that is set once before the loop and updated inside it.", 2,
        slip=Slip("total += value\n            $y.append(total)", "$y.append(total)\n            total += value",
                  "each total is noted before the value is added, so that the list is one step late")),
    Operation("track_maximum", "numbers", "numbers", "accumulating", "list, for each position, the largest of the $items so far", "records",
        """
        $y = []
        for value in $x:
            if $y and $y[-1] > value:
                $y.append($y[-1])
            else:
                $y.append(value)
        """, "[max($x[:i + 1]) for i in range(len($x))]",
        "The best value so far can be updated with one comparison; there is no need to look at the whole beginning again.", 2),
    Operation("reverse", "numbers", "numbers", "indexing and slicing", "put the $items into the opposite order", "backwards",
        """
        $y = []
        for value in $x:
            $y.insert(0, value)
        """, "$x[::-1]", "A slice with a step of -1 walks from the last element to the first and leaves the original untouched."),
    Operation("sort_down", "numbers", "numbers", "sorting", "sort the $items from the largest to the smallest", "ordered",
        """
        $y = list($x)
        for i in range(len($y)):
            for j in range(i + 1, len($y)):
                if $y[j] > $y[i]:
                    $y[i], $y[j] = $y[j], $y[i]
        """, "sorted($x, reverse=True)",
        "A selection sort finds the value for the first place, then the one for the second, and so on; sorted() does the same much faster.", 3,
        slip=Slip("$y[j] > $y[i]", "$y[j] < $y[i]", "it sorts from the smallest to the largest")),
    Operation("sort_up", "numbers", "numbers", "sorting", "sort the $items from the smallest to the largest", "ordered",
        """
        $y = []
        for value in $x:
            place = 0
            while place < len($y) and $y[place] <= value:
                place += 1
            $y.insert(place, value)
        """, "sorted($x)",
        "An insertion sort keeps the part that is done in order and puts each new value into its place there.", 3),
    Operation("take_first", "numbers", "numbers", "indexing and slicing", "take the first $k of the $items, or all of them if there are fewer", "head",
        """
        $y = []
        for value in $x:
            if len($y) == $k:
                break
            $y.append(value)
        """, "$x[:$k]", "A slice that reaches past the end of a list is no error: it simply stops at the end.",
        values={"k": (2, 3, 4, 5)}, slip=Slip("len($y) == $k", "len($y) > $k", "it stops one value too late")),
    Operation("skip_first", "numbers", "numbers", "indexing and slicing", "leave out the first $k of the $items", "rest",
        """
        $y = []
        for i in range($k, len($x)):
            $y.append($x[i])
        """, "$x[$k:]", "Counting from zero, the element at index k is the one that has k elements before it.",
        values={"k": (1, 2, 3)}, slip=Slip("range($k, len($x))", "range($k + 1, len($x))", "it leaves out one value too many")),
    Operation("take_every", "numbers", "numbers", "indexing and slicing", "take one of every $k of the $items, starting with the first", "sampled",
        """
        $y = []
        for i in range(len($x)):
            if i % $k == 0:
                $y.append($x[i])
        """, "$x[::$k]", "The third number of a slice is its step: how far to move before the next element is taken.",
        values={"k": (4, 5)}),
    Operation("remove_repeats", "numbers", "numbers", "sets", "remove repeated $items, keeping the first of each", "unique",
        """
        $y = []
        seen = set()
        for value in $x:
            if value not in seen:
                seen.add(value)
                $y.append(value)
        """, "list(dict.fromkeys($x))",
        "A set answers whether it has seen a value in about the same time, however many values it holds; a list has to look at them all.", 2,
        slip=Slip("if value not in seen:", "if value in seen:", "nothing is ever added, because nothing has been seen yet")),
    Operation("rotate", "numbers", "numbers", "indexing and slicing", "move the first $k of the $items to the end", "rotated",
        """
        $y = list($x)
        for _ in range($k):
            if $y:
                $y.append($y.pop(0))
        """, "[$x[(i + $k) % len($x)] for i in range(len($x))]",
        "The remainder keeps an index inside the list: after the last position comes the first one again.", 2, values={"k": (1, 2, 3)}),
    Operation("add_neighbours", "numbers", "numbers", "comparing neighbours", "add up each pair of neighbouring $items", "sums",
        """
        $y = []
        i = 0
        while i + 1 < len($x):
            $y.append($x[i] + $x[i + 1])
            i += 1
        """, "[a + b for a, b in zip($x, $x[1:])]",
        "zip pairs a list with its own tail, which is a neat way to look at neighbours.", 2),
    Operation("slide_maximum", "numbers", "numbers", "sliding windows", "find the largest of each $k consecutive $items", "peaks",
        """
        $y = []
        for start in range(len($x) - $k + 1):
            best = $x[start]
            for value in $x[start:start + $k]:
                if value > best:
                    best = value
            $y.append(best)
        """, "[max($x[i:i + $k]) for i in range(len($x) - $k + 1)]",
        "A window of width k fits into a list of n elements in n - k + 1 places.", 3,
        values={"k": (2, 3, 4)}, slip=Slip("len($x) - $k + 1", "len($x) - $k", "the last window is left out")),
    Operation("slide_sum", "numbers", "numbers", "sliding windows", "compute the sum of each $k consecutive $items", "sums",
        """
        $y = []
        total = 0
        for i, value in enumerate($x):
            total += value
            if i >= $k:
                total -= $x[i - $k]
            if i >= $k - 1:
                $y.append(total)
        """, "[sum($x[i:i + $k]) for i in range(len($x) - $k + 1)]",
        "A sliding sum need not be computed anew: add the value that enters the window and subtract the one that leaves it.", 3,
        values={"k": (2, 3)}),
    Operation("swap_ends", "numbers", "numbers", "indexing and slicing", "exchange the first and the last of the $items", "swapped",
        """
        $y = list($x)
        if $y:
            $y[0], $y[-1] = $y[-1], $y[0]
        """, "$x[-1:] + $x[1:-1] + $x[:1] if len($x) > 1 else $x[:]",
        "Python evaluates the right side of an assignment first, so that two variables can be exchanged in one line."),
)  # fmt: skip

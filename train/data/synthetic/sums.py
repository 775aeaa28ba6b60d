"""Operations on lists of whole numbers that give something else."""

from __future__ import annotations

from outgrow.train.data.synthetic.operation import Operation, Slip

OPERATIONS = (
    Operation("add_up", "numbers", "number", "accumulating", "compute the sum of the $items", "total",
        """
        $y = 0
        for value in $x:
            $y += value
        """, "sum($x)", "The sum of no numbers at all is 0, which is why an accumulator for a sum starts there.",
        slip=Slip("$y += value", "$y = value", "it only remembers the last value")),
    Operation("find_largest", "numbers", "number", "searching", "find the largest of the $items, or 0 if there are none", "largest",
        """
        $y = 0
        for i, value in enumerate($x):
            if i == 0 or value > $y:
                $y = value
        """, "max($x, default=0)",
        "A search for the largest value has to begin with a value from the list: one that is made up might be larger than all of them."),
    Operation("find_smallest", "numbers", "number", "searching", "find the smallest of the $items, or 0 if there are none", "smallest",
        """
        $y = $x[0] if $x else 0
        for value in $x[1:]:
            if value < $y:
                $y = value
        """, "min($x, default=0)",
        "Decide what an empty list should give before you write the loop: max and min take a default for that case.",
        slip=Slip("value < $y", "value > $y", "it finds the largest value instead")),
    Operation("count_large", "numbers", "number", "counting", "count the $items that are at least $k", "count",
        """
        $y = 0
        for value in $x:
            if value >= $k:
                $y += 1
        """, "sum(value >= $k for value in $x)",
        "True counts as 1 and False as 0, so that a sum of comparisons counts how often they hold.",
        values={"k": (4, 6, 10, 15)}, slip=Slip("$y += 1", "$y += value", "it adds the values up instead of counting them")),
    Operation("count_distinct", "numbers", "number", "sets", "count how many different $items there are", "distinct",
        """
        seen = []
        for value in $x:
            if value not in seen:
                seen.append(value)
        $y = len(seen)
        """, "len(set($x))", "A set holds each value once, so that its length is the number of different values."),
    Operation("measure_spread", "numbers", "number", "searching", "compute the difference between the largest and the smallest of the $items, or 0 if there are none", "spread",
        """
        low = high = $x[0] if $x else 0
        for value in $x:
            if value < low:
                low = value
            elif value > high:
                high = value
        $y = high - low
        """, "max($x) - min($x) if $x else 0",
        "One pass over the data can keep several running values at a time, here the smallest and the largest.", 2),
    Operation("find_longest_rise", "numbers", "number", "counting", "find the length of the longest stretch in which each of the $items is larger than the one before", "longest",
        """
        $y = length = 1 if $x else 0
        for i in range(1, len($x)):
            length = length + 1 if $x[i] > $x[i - 1] else 1
            $y = max($y, length)
        """, "max((j - i for i in range(len($x)) for j in range(i + 1, len($x) + 1) if all(a < b for a, b in zip($x[i:j - 1], $x[i + 1:j]))), default=0)",
        "Keep two counters: the length of the stretch you are in, and the longest you have seen.", 3,
        slip=Slip(" else 1", " else 0", "a new stretch begins with one element, and here it begins with none")),
    Operation("find_second", "numbers", "number", "sorting", "find the second largest different value of the $items, or 0 if there is none", "second",
        """
        first = $y = None
        for value in $x:
            if first is None or value > first:
                first, $y = value, first
            elif value != first and ($y is None or value > $y):
                $y = value
        $y = 0 if $y is None else $y
        """, "(sorted(set($x), reverse=True) + [0, 0])[1] if len(set($x)) > 1 else 0",
        "None is a good sign for a value that is not known yet, for no number can be mistaken for it.", 3),
    Operation("alternate_sum", "numbers", "number", "accumulating", "add the first of the $items, subtract the second, add the third, and so on", "balance",
        """
        $y = 0
        sign = 1
        for value in $x:
            $y += sign * value
            sign = -sign
        """, "sum($x[0::2]) - sum($x[1::2])",
        "A variable that changes its sign in every turn is a simple way to alternate.", 2,
        slip=Slip("sign = -sign", "sign = -1", "after the first value everything is subtracted")),
    Operation("count_peaks", "numbers", "number", "comparing neighbours", "count the $items that are larger than both of their neighbours", "peaks",
        """
        $y = 0
        for i in range(1, len($x) - 1):
            if $x[i] > $x[i - 1] and $x[i] > $x[i + 1]:
                $y += 1
        """, "sum(a < b > c for a, b, c in zip($x, $x[1:], $x[2:]))",
        "The first and the last element have only one neighbour, so the loop leaves them out at both ends.", 2,
        slip=Slip(" and ", " or ", "one smaller neighbour is enough, so that it counts too many")),
    Operation("find_most_common", "numbers", "number", "dictionaries", "find the value that is most frequent among the $items (the smallest of them in a tie), or 0 if there are none", "favourite",
        """
        counts = {}
        for value in $x:
            counts[value] = counts.get(value, 0) + 1
        $y, most = 0, 0
        for value in sorted(counts):
            if counts[value] > most:
                $y, most = value, counts[value]
        """, "min(set($x), key=lambda value: (-$x.count(value), value), default=0)",
        "A dictionary that maps values to counts answers the question of frequency in one pass.", 3),
    Operation("locate_largest", "numbers", "number", "searching", "find the index of the largest of the $items (the first of them in a tie), or -1 if there are none", "place",
        """
        $y = -1
        for i, value in enumerate($x):
            if $y < 0 or value > $x[$y]:
                $y = i
        """, "max(range(len($x)), key=$x.__getitem__, default=-1)",
        "Remember the index and not the value: from the index you can always get back to the value.", 2,
        slip=Slip("value > $x[$y]", "value >= $x[$y]", "in a tie it finds the last place and not the first")),
    Operation("multiply_modulo", "numbers", "number", "remainders", "multiply all of the $items and give the remainder of the product when divided by $k", "product",
        """
        $y = 1
        for value in $x:
            $y = $y * value % $k
        """, "math.prod($x) % $k",
        "Taking the remainder after every step gives the same result as taking it once at the end, and keeps the numbers small.", 2,
        values={"k": (7, 10, 11, 13)}, slip=Slip("$y = 1", "$y = 0", "a product that starts at 0 stays 0"), module="math"),
    # ---- a list gives something else
    Operation("tally_parity", "numbers", "table", "dictionaries", "count how many of the $items are even and how many are odd", "tally",
        """
        $y = {"even": 0, "odd": 0}
        for value in $x:
            if value % 2 == 0:
                $y["even"] += 1
            else:
                $y["odd"] += 1
        """, "{'even': sum(value % 2 == 0 for value in $x), 'odd': sum(value % 2 == 1 for value in $x)}",
        "When all keys are known beforehand, start the dictionary with every count at zero.", 2),
    Operation("tally_bands", "numbers", "table", "dictionaries", "count how many of the $items are low (below $k), how many high ($m or more), and how many in the middle", "bands",
        """
        $y = {"low": 0, "middle": 0, "high": 0}
        for value in $x:
            name = "low" if value < $k else "high" if value >= $m else "middle"
            $y[name] += 1
        """, "{'low': sum(v < $k for v in $x), 'middle': sum($k <= v < $m for v in $x), 'high': sum(v >= $m for v in $x)}",
        "Choose on which side a boundary value falls, write it down, and test exactly that value.", 2,
        values={"k": (5, 8), "m": (14, 18)}, slip=Slip("value >= $m", "value > $m", "a value of exactly $m is counted as middle")),
    Operation("label", "numbers", "words", "conditions", "label each of the $items \"high\" if it is above $k and \"low\" otherwise", "labels",
        """
        $y = []
        for value in $x:
            if value > $k:
                $y.append("high")
            else:
                $y.append("low")
        """, "['high' if value > $k else 'low' for value in $x]",
        "A conditional expression chooses between two values, where an if statement chooses between two actions.",
        values={"k": (5, 9, 14)}),
    Operation("split_rows", "numbers", "grid", "nested lists", "split the $items into rows of $k, the last of which may be shorter", "rows",
        """
        $y = []
        for i, value in enumerate($x):
            if i % $k == 0:
                $y.append([])
            $y[-1].append(value)
        """, "[$x[i:i + $k] for i in range(0, len($x), $k)]",
        "A grid is a list of rows, and a row is a list of values: two indices find a value, first the row's, then the column's.", 2,
        values={"k": (2, 3, 4)}, slip=Slip("i % $k == 0", "i % $k == 1", "a row would have to be there before the first value, and none is")),
)  # fmt: skip

"""Operations on one whole number."""

from __future__ import annotations

from outgrow.train.data.synthetic.operation import Operation, Slip

OPERATIONS = (
    Operation("add_digits", "number", "number", "digits", "compute the sum of the digits of $it", "digit_sum",
        """
        $y = 0
        rest = abs($x)
        while rest:
            $y += rest % 10
            rest //= 10
        """, "sum(int(digit) for digit in str(abs($x)))",
        "The remainder by 10 is the last digit, and the quotient by 10 is the number without it.", 2,
        slip=Slip("rest % 10", "rest // 10", "it takes the number without its last digit where the digit is wanted")),
    Operation("reverse_digits", "number", "number", "digits", "write the digits of $it in the opposite order, without its sign", "mirrored",
        """
        $y = 0
        rest = abs($x)
        while rest:
            $y = $y * 10 + rest % 10
            rest //= 10
        """, "int(str(abs($x))[::-1])", "Multiplying by 10 makes room for one more digit at the end.", 2),
    Operation("count_bits", "number", "number", "digits", "count the ones in the binary form of $it, without its sign", "ones",
        """
        $y = 0
        rest = abs($x)
        while rest:
            $y += rest % 2
            rest //= 2
        """, "bin(abs($x)).count('1')", "What works for decimal digits with 10 works for binary digits with 2.", 2),
    Operation("count_halvings", "number", "number", "while loops", "count how often $it, without its sign, can be halved (rounding down) until it is 0", "steps",
        """
        $y = 0
        rest = abs($x)
        while rest > 0:
            rest //= 2
            $y += 1
        """, "abs($x).bit_length()", "A while loop is right where you know when to stop, but not how many turns that takes.", 2,
        slip=Slip("rest > 0", "rest > 1", "it stops one step early")),
    Operation("sum_to", "number", "number", "for loops", "add up all whole numbers from 1 to $it (0 if there are none)", "total",
        """
        $y = 0
        for i in range(1, $x + 1):
            $y += i
        """, "max($x, 0) * (max($x, 0) + 1) // 2",
        "range leaves out its end: to count up to n, write n + 1.", 1,
        slip=Slip("$x + 1", "$x", "the last number is left out")),
    Operation("count_divisors", "number", "number", "remainders", "count the positive divisors of $it (0 if it is not positive)", "count",
        """
        $y = 0
        for candidate in range(1, $x + 1):
            if $x % candidate == 0:
                $y += 1
        """, "len([d for d in range(1, $x + 1) if not $x % d])", "Every divisor of n lies between 1 and n, so trying them all is slow but certain.", 2),
    Operation("reduce_common", "number", "number", "while loops", "find the greatest common divisor of $k and $it, without its sign", "divisor",
        """
        a, b = $k, abs($x)
        while b:
            a, b = b, a % b
        $y = a
        """, "math.gcd($k, $x)", "Euclid's algorithm replaces the larger number by a remainder until nothing remains.", 3,
        values={"k": (12, 18, 30, 36)}, module="math"),
    Operation("list_digits", "number", "numbers", "digits", "list the decimal digits of $it, without its sign", "digits",
        """
        $y = []
        for symbol in str(abs($x)):
            $y.append(int(symbol))
        """, "list(map(int, str(abs($x))))", "A number has no digits of its own; its text does, and int turns each symbol back into a number."),
    Operation("list_multiples", "number", "numbers", "for loops", "list the multiples of $k that are larger than 0 and less than $it", "multiples",
        """
        $y = []
        value = $k
        while value < $x:
            $y.append(value)
            value += $k
        """, "list(range($k, $x, $k))", "range with three numbers is start, stop and step.", 1,
        values={"k": (3, 4, 6, 7)}, slip=Slip("value < $x", "value <= $x", "the end itself is included where it is a multiple")),
    Operation("count_down", "number", "numbers", "while loops", "count down from $it, without its sign and at most 9, to 1", "countdown",
        """
        $y = []
        rest = min(abs($x), 9)
        while rest > 0:
            $y.append(rest)
            rest -= 1
        """, "list(range(min(abs($x), 9), 0, -1))", "Something inside a while loop has to change what its condition asks, or it never ends."),
    Operation("write_binary", "number", "text", "digits", "write $it, without its sign, in binary", "binary",
        """
        $y = ""
        rest = abs($x)
        while rest or not $y:
            $y = str(rest % 2) + $y
            rest //= 2
        """, "format(abs($x), 'b')", "The digits come out from the last to the first, so each one is put in front of those before.", 2,
        slip=Slip("str(rest % 2) + $y", "$y + str(rest % 2)", "the digits stand in the opposite order")),
)  # fmt: skip

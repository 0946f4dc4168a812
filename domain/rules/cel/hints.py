"""What authors mean when they write what is no CEL: the hints of error messages.

They come from the mistakes of people who know SQL, JavaScript, Python or a spreadsheet. A hint is advice only: what is
refused is decided by syntax.py and codegen.py.
"""

import difflib
import re
from collections.abc import Iterable

# --- Names -----------------------------------------------------------------------------------------------------------

_LITERALS = {
    "True": "use true",
    "False": "use false",
    "TRUE": "use true",
    "FALSE": "use false",
    "None": "use null",
    "NULL": "use null",
    "nil": "use null",
    "undefined": "use null, or has(event.field) for an absent field",
}
_VARIABLES = {
    **_LITERALS,
    "tags": "use participant.tags",
    "counters": "use participant.counters",
    "attributes": "use participant.attributes",
    "tiers": "use participant.tiers",
    "user": "use participant, or event.user for a payload field",
    "customer": "use participant, or event.customer for a payload field",
    "member": "use participant, or event.member for a payload field",
    "payload": "the payload is called event",
    "data": "the payload is called event",
    "today": "use now, the time of the event",
}

# By the name in lower case: what a function of other languages is called here.
_FUNCTIONS = {
    "any": "use list.exists(x, condition)",
    "some": "use list.exists(x, condition)",
    "every": "use list.all(x, condition)",
    "bytes": "there are no bytes: use a string",
    "ceiling": "use ceil(x, n)",
    "coalesce": "use get(map, key, default)",
    "ifnull": "use get(map, key, default)",
    "default": "use get(map, key, default)",
    "concat": "use a + b",
    "count": "use size(x), or list.filter(x, condition).size()",
    "date": 'use timestamp("2026-09-01")',
    "datetime": 'use timestamp("2026-09-01T00:00:00Z")',
    "decimal": "use double(x): every number is an exact decimal",
    "number": "use double(x): every number is an exact decimal",
    "float": "use double(x): every number is an exact decimal",
    "parsefloat": "use double(x): every number is an exact decimal",
    "uint": "use int(x)",
    "parseint": "use int(x)",
    "integer": "use int(x)",
    "trunc": "use int(x)",
    "truncate": "use int(x)",
    "exp": "there is no such function: use * with literals",
    "pow": "there is no power: write x * x",
    "getday": "use getDayOfWeek() (Sunday is 0) or getDate() (1 to 31)",
    "gettime": "use int(timestamp)",
    "getyear": "use getFullYear()",
    "if": "use condition ? a : b",
    "iif": "use condition ? a : b",
    "in": "use x in list",
    "includes": "use x in list, or text.contains(part)",
    "indexof": "use x in list, or text.contains(part)",
    "isnull": "use x == null, or has(event.field)",
    "exist": "use list.exists(x, condition), or has(event.field)",
    "exists": "use list.exists(x, condition), or has(event.field)",
    "keys": "a map is walked by its keys: map.exists(k, condition)",
    "len": "use size(x)",
    "length": "use size(x)",
    "like": 'use text.contains(part) or text.matches("pattern")',
    "lower": "use text.lowerAscii()",
    "lowercase": "use text.lowerAscii()",
    "tolower": "use text.lowerAscii()",
    "tolowercase": "use text.lowerAscii()",
    "upper": "use text.upperAscii()",
    "uppercase": "use text.upperAscii()",
    "toupper": "use text.upperAscii()",
    "touppercase": "use text.upperAscii()",
    "match": 'use text.matches("pattern")',
    "regex": 'use text.matches("pattern")',
    "regexp": 'use text.matches("pattern")',
    "math.abs": "use abs(x)",
    "math.ceil": "use ceil(x, n)",
    "math.floor": "use floor(x, n)",
    "math.max": "use max(a, b) or math.greatest(a, b)",
    "math.min": "use min(a, b) or math.least(a, b)",
    "math.round": "use round(x, n)",
    "math.trunc": "use int(x)",
    "minutes": 'use duration("30m")',
    "seconds": 'use duration("30s")',
    "weeks": "use days(7 * n)",
    "months": "use days(n): months differ in length",
    "years": "use days(n): years differ in length",
    "not": "use !",
    "slice": "use text.substring(start, end)",
    "sum": "a list cannot be summed: send the total with the event",
    "substr": "use text.substring(start, end)",
    "str": "use string(x)",
    "text": "use string(x)",
    "tostring": "use string(x)",
    "strip": "use text.trim()",
    "today": "use now, the time of the event",
}

# How functions and macros with several arguments are written.
USAGE = {
    "all": "list.all(x, condition)",
    "exists": "list.exists(x, condition)",
    "exists_one": "list.exists_one(x, condition)",
    "filter": "list.filter(x, condition)",
    "map": "list.map(x, value) or list.map(x, condition, value)",
    "get": "get(map, key, default)",
    "round": "round(x, n)",
    "floor": "floor(x, n)",
    "ceil": "ceil(x, n)",
    "matches": 'text.matches("pattern")',
    "split": "text.split(separator, limit)",
    "replace": "text.replace(old, new, limit)",
    "substring": "text.substring(start, end)",
    "sets.contains": "sets.contains(all, part)",
    "sets.intersects": "sets.intersects(a, b)",
    "sets.equivalent": "sets.equivalent(a, b)",
}

_WITHIN_A_NAME = re.compile(r"\.\w+-\Z")


def shown(name: str) -> str:
    """A name as far as a message shows it."""
    return name if len(name) <= 100 else name[:100] + "..."


def variable_hint(name: str, known: Iterable[str], before: str) -> str:
    """What to write instead of the unknown variable `name`, which stands behind `before`."""
    if _WITHIN_A_NAME.search(before):
        return 'for a name with a - write event["first-name"]'
    found = _VARIABLES.get(name) or _nearest(name, known)
    return found or f'payload fields are read as event.{shown(name)}, texts are quoted: "{shown(name)}"'


def function_hint(name: str, known: Iterable[str]) -> str | None:
    """What to write instead of the unknown function, method or macro `name`, if anything comes to mind."""
    return _FUNCTIONS.get(name.lower()) or _nearest(name, known)


def _nearest(name: str, known: Iterable[str]) -> str | None:
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower()[:100], by_lower_case, n=1, cutoff=0.6)
    return f"did you mean {by_lower_case[found[0]]}?" if found else None


# --- Syntax ----------------------------------------------------------------------------------------------------------

_LIST_HINT = 'a list is written in brackets: ["a", "b"]'
_COMMENT_HINT = "a comment begins with //"
_DURATION_HINT = 'write days(30), hours(12) or duration("90m")'
_TIMESTAMP_HINT = 'write timestamp("2026-09-01T00:00:00Z")'
_PARENTHESES_HINT = "a method is called with parentheses: text.contains(part)"
_OPERAND_BEFORE = "an operand is missing before it"
_BETWEEN = "an operator or a comma is missing before it"

# (what ends at the error, what begins there, the hint): the first that fits. The text has its strings blotted out.
_SYNTAX: tuple[tuple[re.Pattern[str], re.Pattern[str], str], ...] = tuple(
    (re.compile(before + r"\Z"), re.compile(at), hint)
    for before, at, hint in (
        ("==", "=", "use =="),
        ("!=", "=", "use !="),
        (r"[-+*/%]", "=(?!=)", "an expression cannot assign"),
        (r"!\s+", "=", "write != without a space"),
        ("", "=>", "use >="),
        ("", "=<", "use <="),
        ("", "=!", "use !="),
        ("", "=~", 'use text.matches("pattern")'),
        ("", "!=|==", _OPERAND_BEFORE),
        ("", "!", "use != to compare"),
        ("", "=", "did you mean ==? use == to compare"),
        ("-", ">", "a macro is written list.exists(x, condition)"),
        ("<", ">", "use !="),
        (r"[&|]\s*", r"&&|\|\|", _OPERAND_BEFORE),
        ("", r"&(?!&)", "use &&"),
        ("", r"\|(?!\|)", "use ||"),
        (r"\+", r"\+", "an expression cannot assign"),
        (r"\*", r"\*", "there is no power: write x * x"),
        ("", r"\^", "there is no power: write x * x"),
        ("/", r"\*", _COMMENT_HINT),
        ("", r"/\*|#", _COMMENT_HINT),
        ("", ";", "leave it out: an expression is a single value"),
        (r"[0-9]", r",\s*[0-9]", "write 1000 or 0.5, without a comma"),
        ("", ",", _LIST_HINT),
        (r",\s*", r"[)\]}]", "remove the comma before it"),
        (r"\.", r"[`0-9]|[^\x00-\x7f]|true\b|false\b|null\b|in\b", 'for such a name write ["..."] instead of the dot'),
        (r"\.", r"\.", "a name is missing between the dots"),
        ("", "`", 'for such a name write event["first-name"]'),
        ("", "[“”«»„]", 'use straight quotes "'),
        ("", "[‘’`]", "use straight quotes '"),
        ("", r"[$@€£]", "leave it out"),
        (r"[0-9]{4}-[0-9]{2}-[0-9]{2}", "T", _TIMESTAMP_HINT),
        (r"[0-9]\s*", r"(?:d|days?|h|hours?|m|min|minutes?|s|seconds?|w|weeks?)\b", _DURATION_HINT),
        (r"\b(?:not|NOT)\s+", ".", "use ! for not"),
        (r"\b(?:if|IF)\s+", ".", "use condition ? a : b"),
        (r"\bhas\s+", ".", "write has(event.field)"),
        ("", r"(?:and|AND|And)\b", "use &&"),
        ("", r"(?:or|OR|Or)\b", "use ||"),
        ("", r"(?:not|NOT)\s+in\b", "use !(x in list)"),
        ("", r"(?:not|NOT)\b", "use !"),
        ("", r"(?:is|IS)\b", "use =="),
        ("", r"(?:if|then|else|IF|THEN|ELSE)\b", "use condition ? a : b"),
        ("", r"(?:between|BETWEEN)\b", "use a <= x && x <= b"),
        ("", r"(?:like|LIKE)\b", 'use text.contains(part) or text.matches("pattern")'),
        ("", r"(?:contains|startsWith|endsWith|matches)\b", _PARENTHESES_HINT),
        (r"\.(?:contains|startsWith|endsWith|matches)\s*", '"', _PARENTHESES_HINT),
        (r"\?\s*", ":", "write condition ? a : b"),
        ("", ":", "a : belongs to a map or to condition ? a : b"),
        (r"[-+*/%<>=&|?:]\s*", r"[-+*/%<>=&|?)\]}]", _OPERAND_BEFORE),
        (r"[\w\"'\])}]\s*", r"[\w\"'\[({]", _BETWEEN),
    )
)  # fmt: skip
_CONTEXT = 40
_LAST_OPERATOR = re.compile(r"(?P<operator>&&|\|\||[<>=!]=|[-+*/%<>!?:,.]|\bin)\Z")


def syntax_hint(masked: str, position: int) -> str | None:
    """What to write instead of that which stands at `position`. `masked` is the text without contents of strings."""
    before = masked[max(0, position - _CONTEXT) : position]
    after = masked[position : position + _CONTEXT]
    for pattern, following, hint in _SYNTAX:
        if following.match(after) and pattern.search(before):
            return hint
    return None


def end_hint(masked: str) -> str | None:
    """What is missing at the end of the text."""
    text = masked.rstrip()[-_CONTEXT:]
    found = _LAST_OPERATOR.search(text)
    if found and found["operator"] == ".":
        return "a name is missing after ."
    if found:
        return f"an operand is missing after {found['operator']}"
    if "?." in text:
        return "use has(event.field) for a field that may be absent"
    return "condition ? a : b needs both values" if "?" in text else None

"""From text to a small typed tree: cel-python's grammar parses, this module guards it and simplifies what it gives.

Before the parser sees the text, `_mask` takes the string literals out. It reads each one in a single pass and puts
letters of the same number in its place (`event.type == "p\\n"` becomes `event.type == "xxx"`), for three reasons: the
grammar's pattern for strings backtracks exponentially on an unterminated one (40 times `\\n` after a quote never ends),
an escape is decoded once and refused where it is wrong, and positions in error messages stay those of the source.
"""

import bisect
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import cast

from celpy.celparser import CELParser
from lark import Lark, Token, Tree
from lark.exceptions import LarkError, UnexpectedInput

from domain.limits import EXPRESSION_CHARS, EXPRESSION_DEPTH
from domain.rules.cel.errors import EvaluationError, ExpressionError
from domain.rules.cel.hints import end_hint, shown, syntax_hint
from domain.rules.cel.numbers import parse_hexadecimal, parse_number

# --- The tree --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """A part of an expression; `position` is its offset in the source."""

    position: int


@dataclass(frozen=True, slots=True)
class Literal(Node):
    """null, a bool, a string or a number."""

    value: bool | str | Decimal | None


@dataclass(frozen=True, slots=True)
class ListNode(Node):
    """`[a, b]`"""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class MapNode(Node):
    """`{k: v}`"""

    entries: tuple[tuple[Node, Node], ...]


@dataclass(frozen=True, slots=True)
class Name(Node):
    """A variable, a type name, or the variable of a macro."""

    name: str


@dataclass(frozen=True, slots=True)
class Select(Node):
    """`operand.field`"""

    operand: Node
    field: str


@dataclass(frozen=True, slots=True)
class Index(Node):
    """`operand[key]`"""

    operand: Node
    key: Node


@dataclass(frozen=True, slots=True)
class Call(Node):
    """`name(arguments)`, or `target.name(arguments)`; macros too."""

    name: str
    target: Node | None
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Unary(Node):
    """`!operand` or `-operand`"""

    operator: str
    operand: Node


@dataclass(frozen=True, slots=True)
class Relation(Node):
    """`left operator right` with one of == != < <= > >= in."""

    operator: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Arithmetic(Node):
    """`first + b - c`: a chain of operators of one precedence, from left to right."""

    first: Node
    rest: tuple[tuple[str, Node], ...]


@dataclass(frozen=True, slots=True)
class Logic(Node):
    """`a && b && c` or `a || b || c`, flattened, parentheses included: both operators are associative."""

    operator: str
    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Conditional(Node):
    """`c1 ? v1 : c2 ? v2 : otherwise`, flattened."""

    branches: tuple[tuple[Node, Node], ...]
    otherwise: Node


# --- Errors with a position ------------------------------------------------------------------------------------------


class Source:
    """The text of an expression, which can say where an offset lies."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def place(self, position: int) -> tuple[int, int]:
        """Line and column of the offset `position`, both from 1."""
        line = bisect.bisect_right(self._line_starts, position)
        return line, position - self._line_starts[line - 1] + 1

    def error(self, message: str, position: int, hint: str | None = None) -> ExpressionError:
        """An ExpressionError at the offset `position`."""
        line, column = self.place(position)
        return ExpressionError(message, line, column, hint)


# --- String literals and brackets ------------------------------------------------------------------------------------

_OPENING = re.compile(r"""(?P<prefix>[rRbB]{0,2})(?P<quote>\"{3}|'{3}|"|')""")
_COMMENT = re.compile(r"//[^\n]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD_CHARACTER = re.compile(r"[A-Za-z0-9_]")
_OTHER = re.compile(r"[^A-Za-z_\"'/()\[\]{}]+")
_ESCAPE = re.compile(
    r"\\(?:(?P<simple>[abfnrtv\\?\"'`])|[xX](?P<hex2>[0-9a-fA-F]{2})|u(?P<hex4>[0-9a-fA-F]{4})"
    r"|U(?P<hex8>[0-9a-fA-F]{8})|(?P<octal>[0-3][0-7]{2}))"
)
_SIMPLE_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


@dataclass(frozen=True, slots=True)
class _Masked:
    text: str
    strings: dict[int, tuple[int, str]]  # start of a literal -> its end and its value
    words: frozenset[int]  # where words begin


def _mask(source: Source) -> _Masked:
    """The text without the contents of its strings; refuses bad strings and brackets, and brackets nested too deep."""
    text = source.text
    pieces: list[str] = []
    strings: dict[int, tuple[int, str]] = {}
    words: set[int] = set()
    brackets = _Brackets(source)
    position = 0
    while position < len(text):
        end = position + 1
        piece: str | None = None
        if opening := _OPENING.match(text, position):
            value, end = _read_string(source, opening)
            strings[position] = (end, value)
            piece = f'"{"x" * (end - position - 2)}"'
        elif word := _WORD.match(text, position):
            words.add(position)
            end = word.end()
        elif comment := _COMMENT.match(text, position):
            end = comment.end()
        elif other := _OTHER.match(text, position):
            end = other.end()
        elif text[position] in _CLOSING:
            brackets.open(position)
        elif text[position] in ")]}":
            brackets.close(position)
        pieces.append(text[position:end] if piece is None else piece)
        position = end
    brackets.check_all_closed()
    return _Masked("".join(pieces), strings, frozenset(words))


_CLOSING = {"(": ")", "[": "]", "{": "}"}


class _Brackets:
    """The brackets that are open, while the text is read. Each method raises ExpressionError for what doesn't fit."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: list[int] = []

    def open(self, position: int) -> None:
        """A bracket opens at `position`."""
        self._open.append(position)
        if len(self._open) > EXPRESSION_DEPTH:
            raise _too_deep(self._source, position)

    def close(self, position: int) -> None:
        """A bracket closes at `position`: it has to be the counterpart of the one opened last."""
        text = self._source.text
        if not self._open:
            raise self._source.error(f"unexpected '{text[position]}'", position, "no bracket is open here")
        opening = self._open.pop()
        if text[position] == _CLOSING[text[opening]]:
            return
        line, column = self._source.place(opening)
        hint = (
            f"'{text[opening]}' of line {line}, column {column} has to be closed by '{_CLOSING[text[opening]]}' first"
        )
        raise self._source.error(f"unexpected '{text[position]}'", position, hint)

    def check_all_closed(self) -> None:
        """The text has ended."""
        if not self._open:
            return
        bracket = self._source.text[self._open[-1]]
        raise self._source.error(f"'{bracket}' is not closed", self._open[-1], f"add '{_CLOSING[bracket]}'")


def _too_deep(source: Source, position: int) -> ExpressionError:
    return source.error(f"nested deeper than {EXPRESSION_DEPTH} levels", position)


def _read_string(source: Source, opening: re.Match[str]) -> tuple[str, int]:
    """The value and the end of the string literal that begins at `opening`."""
    start = opening.start()
    prefix = opening["prefix"].lower()
    quote = opening["quote"]
    if "b" in prefix or prefix == "rr":
        raise source.error("bytes literals are not supported", start)
    multiline = len(quote) == 3
    raw = prefix == "r"
    position = opening.end()
    value: list[str] = []
    while not source.text.startswith(quote, position):
        character = source.text[position : position + 1]
        if character == "" or (character in "\r\n" and not multiline):
            raise source.error("string is not closed", start, f"end it with {quote}")
        if character == "\\" and not raw:
            character, position = _read_escape(source, position)
        else:
            position += 1
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise source.error("NUL and surrogate characters are not allowed", position - 1)
        value.append(character)
    return "".join(value), position + len(quote)


def _read_escape(source: Source, position: int) -> tuple[str, int]:
    escape = _ESCAPE.match(source.text, position)
    if escape is None:
        raise source.error("invalid escape in a string", position, r"write \\ for a backslash, or use r'...'")
    if simple := escape["simple"]:
        return _SIMPLE_ESCAPES.get(simple, simple), escape.end()
    digits = escape["hex2"] or escape["hex4"] or escape["hex8"]
    code = int(digits, 16) if digits else int(escape["octal"], 8)
    if code > 0x10FFFF:
        raise source.error("escape beyond the last Unicode character", position)
    return chr(code), escape.end()


# --- Parsing ---------------------------------------------------------------------------------------------------------

_parser_lock = threading.Lock()
_parser: Lark | None = None


class _PositionedParser(CELParser):
    """cel-python's parser, but `true` and `false` keep their positions."""

    @staticmethod
    def ambiguous_literals(t: Token) -> Token:
        """The lexer's callback for a name."""
        return Token.new_borrow_pos("BOOL_LIT", t.value, t) if t.value in ("true", "false") else t


def _parse_masked(text: str) -> Tree[Token]:
    """The tree of the grammar. The parser is created once, and used under a lock: it is not safe under threads."""
    global _parser
    with _parser_lock:
        if _parser is None:
            # It is kept in the class, and one that somebody else had created would not be ours.
            CELParser.CEL_PARSER = None
            _PositionedParser()
            _parser = cast(Lark, CELParser.CEL_PARSER)
        return _parser.parse(text)


def parse(source: Source) -> Node:
    """The tree of an expression. Raises ExpressionError: a syntax error, too long, or nested too deep."""
    text = source.text
    if len(text) > EXPRESSION_CHARS:
        raise ExpressionError(f"expression longer than {EXPRESSION_CHARS} characters")
    if not text.strip():
        raise ExpressionError("expression is empty")
    masked = _mask(source)
    try:
        return _Converter(source, masked).convert(_parse_masked(masked.text), 0)
    except UnexpectedInput as unexpected:
        raise _syntax_error(source, masked, unexpected) from None
    except LarkError:
        raise ExpressionError("not a valid expression") from None
    except RecursionError:
        raise ExpressionError(f"nested deeper than {EXPRESSION_DEPTH} levels") from None


_OPERATOR = re.compile(r"&&|\|\||[<>=!]=|.", re.DOTALL)


def _syntax_error(source: Source, masked: _Masked, unexpected: UnexpectedInput) -> ExpressionError:
    token = getattr(unexpected, "token", None)
    position = unexpected.pos_in_stream
    if position is None or (isinstance(token, Token) and token.type == "$END"):
        return source.error("unexpected end of the expression", len(source.text.rstrip()), end_hint(masked.text))
    return _unexpected(source, masked, position)


def _unexpected(source: Source, masked: _Masked, position: int) -> ExpressionError:
    """The error of a word or an operator that cannot stand at `position`."""
    position = _start_of_word(masked, position)
    found = _WORD.match(source.text, position) or _OPERATOR.match(source.text, position)
    assert found is not None, "an error lies within the text"
    return source.error(f"unexpected '{shown(found[0])}'", position, syntax_hint(masked.text, position))


def _start_of_word(masked: _Masked, position: int) -> int:
    """Where the word around `position` begins: the lexer reads `1 indexOf` as `1 in dexOf`."""
    if not _WORD.match(masked.text, position):
        return position
    start = position
    while start not in masked.words and _WORD_CHARACTER.fullmatch(masked.text, start - 1, start):
        start -= 1
    return start if start in masked.words else position


# --- Conversion ------------------------------------------------------------------------------------------------------

_WRAPPERS = frozenset(
    {
        "expr",
        "conditionalor",
        "conditionaland",
        "relation",
        "addition",
        "multiplication",
        "unary",
        "member",
        "primary",
    }
)
_RELATIONS = {
    "relation_lt": "<",
    "relation_le": "<=",
    "relation_gt": ">",
    "relation_ge": ">=",
    "relation_eq": "==",
    "relation_ne": "!=",
    "relation_in": "in",
}
_ARITHMETIC = {
    "addition_add": "+",
    "addition_sub": "-",
    "multiplication_mul": "*",
    "multiplication_div": "/",
    "multiplication_mod": "%",
}
_POSTFIX = frozenset({"member_dot", "member_dot_arg", "member_index"})


def _unwrapped(tree: Tree[Token]) -> Tree[Token]:
    """The first tree below that says something: the grammar wraps each operand in nine levels of precedence."""
    while tree.data in _WRAPPERS and len(tree.children) == 1:
        tree = cast("Tree[Token]", tree.children[0])
    return tree


class _Converter:
    """Turns lark's tree into ours. Chains are unrolled in loops, so recursion follows brackets and prefixes only."""

    def __init__(self, source: Source, masked: _Masked) -> None:
        self._source = source
        self._masked = masked
        self._by_rule: dict[str, Callable[[Tree[Token], int], Node]] = {
            "expr": self._conditional,
            "conditionalor": self._logic,
            "conditionaland": self._logic,
            "relation": self._relation,
            "addition": self._arithmetic,
            "multiplication": self._arithmetic,
            "unary": self._unary,
            "member_dot": self._member,
            "member_dot_arg": self._member,
            "member_index": self._member,
            "member_object": self._message,
            "paren_expr": lambda tree, depth: self.convert(self._child(tree, 0), depth + 1),
            "list_lit": self._list,
            "map_lit": self._map,
            "literal": self._literal,
            "ident": self._name,
            "dot_ident": self._name,
            "ident_arg": self._call,
            "dot_ident_arg": self._call,
        }

    def convert(self, tree: Tree[Token], depth: int) -> Node:
        tree = _unwrapped(tree)
        if depth > EXPRESSION_DEPTH:
            raise _too_deep(self._source, self._position(tree))
        return self._by_rule[str(tree.data)](tree, depth)

    @staticmethod
    def _child(tree: Tree[Token], index: int) -> Tree[Token]:
        return cast("Tree[Token]", tree.children[index])

    def _position(self, tree: Tree[Token]) -> int:
        return int(getattr(tree.meta, "start_pos", 0))

    def _token(self, tree: Tree[Token], index: int) -> Token:
        """The name at `index`; refuses one that begins inside a word: the lexer reads `a inb` as `a in b`."""
        token = cast(Token, tree.children[index])
        if token.start_pos not in self._masked.words:
            raise _unexpected(self._source, self._masked, int(token.start_pos or 0))
        return token

    def _conditional(self, tree: Tree[Token], depth: int) -> Node:
        position = self._position(tree)
        branches = []
        while tree.data == "expr" and len(tree.children) == 3:
            condition = self.convert(self._child(tree, 0), depth)
            branches.append((condition, self.convert(self._child(tree, 1), depth)))
            tree = _unwrapped(self._child(tree, 2))
        return Conditional(position, tuple(branches), self.convert(tree, depth))

    def _logic(self, tree: Tree[Token], depth: int) -> Node:
        rule = str(tree.data)
        operator = "||" if rule == "conditionalor" else "&&"
        position = self._position(tree)
        operands: list[Tree[Token]] = []
        while tree.data == rule and len(tree.children) == 2:
            operands.append(self._child(tree, 1))
            tree = self._child(tree, 0)
        operands.append(tree)
        terms: list[Node] = []
        for operand in reversed(operands):
            term = self.convert(operand, depth)
            terms.extend(term.terms if isinstance(term, Logic) and term.operator == operator else (term,))
        return Logic(position, operator, tuple(terms))

    def _relation(self, tree: Tree[Token], depth: int) -> Node:
        comparison = self._child(tree, 0)
        left = self.convert(self._child(comparison, 0), depth + 1)
        right = self.convert(self._child(tree, 1), depth)
        return Relation(self._position(tree), _RELATIONS[str(comparison.data)], left, right)

    def _arithmetic(self, tree: Tree[Token], depth: int) -> Node:
        rule = tree.data
        position = self._position(tree)
        rest: list[tuple[str, Node]] = []
        while tree.data == rule and len(tree.children) == 2:
            operation = self._child(tree, 0)
            rest.append((_ARITHMETIC[str(operation.data)], self.convert(self._child(tree, 1), depth)))
            tree = self._child(operation, 0)
        return Arithmetic(position, self.convert(tree, depth), tuple(reversed(rest)))

    def _unary(self, tree: Tree[Token], depth: int) -> Node:
        operators: list[tuple[int, str]] = []
        while tree.data == "unary" and len(tree.children) == 2:
            prefix = self._child(tree, 0)
            operators.append((self._position(tree), "!" if prefix.data == "unary_not" else "-"))
            tree = self._child(tree, 1)
        node = self.convert(tree, depth + len(operators))
        for position, operator in reversed(operators):
            node = Unary(position, operator, node)
        return node

    def _member(self, tree: Tree[Token], depth: int) -> Node:
        """`a.b[c].d(e)`: the operations after the operand, collected from the outside and applied from the inside."""
        operations: list[Tree[Token]] = []
        tree = _unwrapped(tree)
        while tree.data in _POSTFIX:
            operations.append(tree)
            tree = _unwrapped(self._child(tree, 0))
        if len(operations) > EXPRESSION_DEPTH:
            raise _too_deep(self._source, self._position(tree))
        node = self.convert(tree, depth)
        for operation in reversed(operations):
            node = self._postfix(node, operation, depth)
        return node

    def _postfix(self, node: Node, operation: Tree[Token], depth: int) -> Node:
        if operation.data == "member_index":
            return Index(node.position, node, self.convert(self._child(operation, 1), depth + 1))
        name = self._token(operation, 1)
        if operation.data == "member_dot":
            return Select(node.position, node, str(name))
        return Call(int(name.start_pos or 0), str(name), node, self._arguments(operation, 2, depth))

    def _arguments(self, tree: Tree[Token], index: int, depth: int) -> tuple[Node, ...]:
        if len(tree.children) <= index:
            return ()
        listed = self._child(tree, index)
        return tuple(self.convert(cast("Tree[Token]", child), depth + 1) for child in listed.children)

    def _call(self, tree: Tree[Token], depth: int) -> Node:
        name = self._token(tree, 0)
        return Call(int(name.start_pos or 0), str(name), None, self._arguments(tree, 1, depth))

    def _name(self, tree: Tree[Token], depth: int) -> Node:
        name = self._token(tree, 0)
        return Name(int(name.start_pos or 0), str(name))

    def _list(self, tree: Tree[Token], depth: int) -> Node:
        return ListNode(self._position(tree), self._arguments(tree, 0, depth))

    def _map(self, tree: Tree[Token], depth: int) -> Node:
        parts = self._arguments(tree, 0, depth)
        return MapNode(self._position(tree), tuple(zip(parts[::2], parts[1::2], strict=True)))

    def _message(self, tree: Tree[Token], depth: int) -> Node:
        raise self._source.error("message literals are not supported", self._position(tree))

    def _literal(self, tree: Tree[Token], depth: int) -> Node:
        token = cast(Token, tree.children[0])
        position = int(token.start_pos or 0)
        if position in self._masked.strings:
            end, value = self._masked.strings[position]
            if token.end_pos == end:
                return Literal(position, value)
        return Literal(position, self._plain_literal(token, position))

    def _plain_literal(self, token: Token, position: int) -> bool | Decimal | None:
        if token.type == "NULL_LIT":
            return None
        if token.type == "BOOL_LIT":
            return str(token) == "true"
        if token.type not in ("INT_LIT", "UINT_LIT", "FLOAT_LIT"):
            raise self._source.error(f"unexpected {token}", position)
        digits = str(token).rstrip("uU")
        try:
            return parse_hexadecimal(digits) if "x" in digits else parse_number(digits)
        except EvaluationError as error:
            raise self._source.error(str(error), position) from None

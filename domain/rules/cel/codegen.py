"""From the tree of an expression to one Python function, made once per rule version.

`event.type == "purchase" && event.amount >= 100.0` becomes (shortened):

    def f0(event, participant, program, groups, group, now, charge):
        failure = None
        try:
            if not (select(event, 'type') == 'purchase'):
                return False
        except EvaluationLimit:
            raise
        except EvaluationError as error:
            failure = error
        try:
            if not greater_or_equal(select(event, 'amount'), k1):
                return False
        except ...
        if failure is not None:
            raise failure
        return True

- A strict operation is a call of a guarded helper (numbers.py, functions.py, values.py); a lazy one (`&&`, `||`,
  `?:`, `has`, a macro) is a run of statements. A lazy operation inside a strict one moves into a function of its own,
  `f1(event, l1)`, so that nothing in the generated text nests deep, however the expression nests.
- Text of the author reaches the generated source only as the `repr` of a string. Names do not: the variables are the
  six parameters, the variable of a macro is `l1`, `l2`, ..., other constants are `k1`, `k2`, ... in the globals, and
  there is no attribute access at all. `__builtins__` is empty.
- In the body of a macro each run of code that is entered as a whole begins with `charge(n)`, n being the number of its
  nodes. Outside of macros nothing is counted: an expression of 4,096 characters has an end by itself.
- `failure` is deleted as it is raised: the exception's traceback refers to the frame, and the frame to the exception.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from domain.rules.cel import functions, numbers, values
from domain.rules.cel.errors import EvaluationError, EvaluationLimit, ExpressionError, MissingField
from domain.rules.cel.functions import FUNCTIONS, METHODS, NAMESPACES, Function
from domain.rules.cel.hints import USAGE, function_hint, shown, variable_hint
from domain.rules.cel.syntax import (
    Arithmetic,
    Call,
    Conditional,
    Index,
    ListNode,
    Literal,
    Logic,
    MapNode,
    Name,
    Node,
    Relation,
    Select,
    Source,
    Unary,
)
from domain.rules.cel.values import TYPE_NAMES, CelType, Value

VARIABLES = ("event", "participant", "program", "groups", "group", "now")
_PARAMETERS = (*VARIABLES, "charge")

_HELPERS: dict[str, Any] = {
    helper.__name__: helper
    for helper in (
        functions.absent_variable,
        functions.elements,
        functions.has_field,
        functions.index,
        functions.invert,
        functions.is_in,
        functions.make_map,
        functions.matches_constant,
        functions.select,
        numbers.add,
        numbers.add_numbers,
        numbers.divide,
        numbers.equals_number,
        numbers.greater,
        numbers.greater_or_equal,
        numbers.less,
        numbers.less_or_equal,
        numbers.multiply,
        numbers.negate,
        numbers.number_in,
        numbers.remainder,
        numbers.subtract,
        values.equals,
        values.not_a_bool,
        EvaluationError,
        EvaluationLimit,
        MissingField,
        str,
        type,
    )
}


def _library_name(name: str, is_method: bool) -> str:
    """What a library function is called in generated code."""
    return f"{'method' if is_method else 'function'}_{name.replace('.', '_')}"


for _name, _function in FUNCTIONS.items():
    _HELPERS[_library_name(_name, False)] = _function.implementation
for _name, _function in METHODS.items():
    _HELPERS[_library_name(_name, True)] = _function.implementation

_ARITHMETIC = {"-": "subtract", "*": "multiply", "/": "divide", "%": "remainder"}
_COMPARISONS = {"<": "less", "<=": "less_or_equal", ">": "greater", ">=": "greater_or_equal"}
_MACROS = {"all": (2,), "exists": (2,), "exists_one": (2,), "map": (2, 3), "filter": (2,)}

# Calls nested deeper than this in one generated line are cut by a temporary: Python's parser has a limit of its own.
_MAX_INLINE_NESTING = 12

_NOT_CONSTANT = object()


@dataclass(frozen=True, slots=True)
class _Code:
    """A piece of generated text that gives a value: its nesting, the kind of value if known, the value if constant."""

    text: str
    kind: str | None = None
    nesting: int = 0
    constant: Value = _NOT_CONSTANT

    @property
    def is_constant(self) -> bool:
        return self.constant is not _NOT_CONSTANT


@dataclass(slots=True)
class _Body:
    """One generated function while it is written."""

    name: str
    lines: list[str] = field(default_factory=list)
    indent: int = 1
    own_names: set[str] = field(default_factory=set)
    parameters: dict[str, None] = field(default_factory=dict)  # in the order of their first use
    temporaries: int = 0
    cost: int = 0

    def emit(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def use(self, name: str) -> str:
        if name not in self.own_names:
            self.parameters.setdefault(name)
        return name

    def temporary(self) -> str:
        self.temporaries += 1
        return f"t{self.temporaries}"


@dataclass(frozen=True, slots=True)
class Compiled:
    """The function of an expression, to be called with the six variables and `charge`, and its generated source."""

    function: Callable[..., Value]
    needs_charge: bool
    uses_variables: bool
    python: str


def generate(source: Source, root: Node) -> Compiled:
    """Compiles a tree. Raises ExpressionError for unknown names and wrong numbers of arguments."""
    if isinstance(root, Name) and root.name in TYPE_NAMES:
        raise source.error("a type is not a value", root.position, "compare it: type(x) == string")
    generator = _Generator(source)
    main = generator.function(root)
    python = generator.text()
    namespace: dict[str, Any] = {"__builtins__": {}, **generator.globals}
    # Safe because of what `python` can contain: see the top of this module.
    exec(compile(python, "<cel>", "exec"), namespace)  # noqa: S102
    used = main.parameters
    return Compiled(namespace[main.name], "charge" in used, any(name in used for name in VARIABLES), python)


class _Generator:
    def __init__(self, source: Source) -> None:
        self.globals: dict[str, Any] = {}
        self._source = source
        self._finished: list[str] = []
        self._functions = 0
        self._constants = 0
        self._numbers: dict[str, str] = {}  # as written: 1 and 1.0 print differently
        self._loop_variables = 0
        self._scope: dict[str, str] = {}  # variables of the macros around: CEL name -> Python name
        self._loops = 0
        self._body = _Body("")

    def text(self) -> str:
        return "\n".join(self._finished) + "\n"

    # -- Functions, blocks and charges --

    def function(self, node: Node) -> _Body:
        """Writes a function that returns the value of `node`; afterwards the body knows what it needs."""
        outer = self._body
        body = self._body = _Body(f"f{self._functions}")
        self._functions += 1
        is_main = body.name == "f0"
        with self._run_of_code():
            self._tail(node)
        self._body = outer
        parameters = _PARAMETERS if is_main else tuple(body.parameters)
        self._finished.append("\n".join([f"def {body.name}({', '.join(parameters)}):", *body.lines]))
        return body

    def _outlined(self, node: Node, kind: str | None) -> _Code:
        """A call of a new function that gives the value of a lazy node."""
        body = self.function(node)
        arguments = ", ".join(self._body.use(name) for name in body.parameters)
        return _Code(f"{body.name}({arguments})", kind, 1)

    @contextmanager
    def _block(self, head: str) -> Iterator[None]:
        self._body.emit(head)
        self._body.indent += 1
        yield
        self._body.indent -= 1

    @contextmanager
    def _run_of_code(self) -> Iterator[None]:
        """Code that is entered as a whole; inside a macro it begins with a charge for the nodes visited in it."""
        body = self._body
        if not self._loops:
            yield
            return
        outer_cost, body.cost = body.cost, 0
        place, indent = len(body.lines), body.indent
        body.lines.append("")
        yield
        body.lines[place] = "    " * indent + f"{body.use('charge')}({max(body.cost, 1)})"
        body.cost = outer_cost

    def _helper(self, name: str) -> str:
        self.globals[name] = _HELPERS[name]
        return name

    def _constant(self, value: Value, kind: str | None) -> _Code:
        """Strings, bools and null appear in the text; other constants are globals."""
        if value is None or type(value) in (str, bool):
            return _Code(repr(value), kind, 0, value)
        known = self._numbers.get(str(value)) if type(value) is Decimal else None
        if known is not None:
            return _Code(known, kind, 0, value)
        self._constants += 1
        name = f"k{self._constants}"
        self.globals[name] = value
        if type(value) is Decimal:
            self._numbers[str(value)] = name
        return _Code(name, kind, 0, value)

    def _call(self, helper: str, *arguments: _Code, kind: str | None = None, charged: bool = False) -> _Code:
        texts = [argument.text for argument in arguments]
        if charged:
            texts.insert(0, self._body.use("charge"))
        nesting = 1 + max((argument.nesting for argument in arguments), default=0)
        return self._cut(_Code(f"{self._helper(helper)}({', '.join(texts)})", kind, nesting))

    def _cut(self, code: _Code) -> _Code:
        if code.nesting <= _MAX_INLINE_NESTING:
            return code
        name = self._body.temporary()
        self._body.emit(f"{name} = {code.text}")
        return _Code(name, code.kind)

    # -- Nodes in tail position: statements that end in return --

    def _tail(self, node: Node) -> None:
        if isinstance(node, Logic):
            self._body.cost += 1
            self._logic(node)
        elif isinstance(node, Conditional):
            self._body.cost += 1
            self._conditional(node)
        elif isinstance(node, Call) and node.target is not None and self._is_macro(node):
            self._body.cost += 1
            self._macro(node)
        elif isinstance(node, Call) and node.target is None and node.name == "has":
            self._body.cost += 1
            self._has(node)
        else:
            self._body.emit(f"return {self._value(node).text}")

    def _logic(self, node: Logic) -> None:
        decisive, neutral = ("False", "True") if node.operator == "&&" else ("True", "False")
        body = self._body
        body.emit("failure = None")
        for term in node.terms:
            with self._absorbing(), self._run_of_code():
                self._decide(term, node.operator, decisive, neutral)
        self._raise_failure()
        body.emit(f"return {neutral}")

    def _decide(self, term: Node, operator: str, decisive: str, neutral: str) -> None:
        """Returns the decisive bool if `term` gives it; notes a failure if it gives no bool."""
        body = self._body
        code = self._value(term)
        if code.kind == "bool":
            with self._block(f"if {'not ' if decisive == 'False' else ''}{code.text}:"):
                body.emit(f"return {decisive}")
            return
        name = body.temporary()
        body.emit(f"{name} = {code.text}")
        with self._block(f"if {name} is {decisive}:"):
            body.emit(f"return {decisive}")
        with self._block(f"if {name} is not {neutral}:"):
            body.emit(f"failure = failure or {self._helper('not_a_bool')}({operator!r}, {name})")

    @contextmanager
    def _absorbing(self) -> Iterator[None]:
        """Notes the first error instead of raising it; a limit is always raised."""
        with self._block("try:"):
            yield
        with self._block(f"except {self._helper('EvaluationLimit')}:"):
            self._body.emit("raise")
        with self._block(f"except {self._helper('EvaluationError')} as error:"):
            self._body.emit("failure = failure or error")

    def _raise_failure(self) -> None:
        with self._block("if failure is not None:"):
            with self._block("try:"):
                self._body.emit("raise failure")
            with self._block("finally:"):
                self._body.emit("del failure")

    def _conditional(self, node: Conditional) -> None:
        for condition, value in node.branches:
            name = self._condition(condition, "?:")
            with self._block(f"if {name}:"), self._run_of_code():
                self._tail(value)
        self._tail(node.otherwise)

    def _condition(self, node: Node, operation: str) -> str:
        """Text that is surely a bool; raises at run time when the node gives none."""
        code = self._value(node)
        if code.kind == "bool":
            return code.text
        name = self._body.temporary()
        self._body.emit(f"{name} = {code.text}")
        with self._block(f"if {name} is not True and {name} is not False:"):
            self._body.emit(f"raise {self._helper('not_a_bool')}({operation!r}, {name})")
        return name

    def _has(self, node: Call) -> None:
        argument = node.arguments[0] if len(node.arguments) == 1 else None
        if not isinstance(argument, Select):
            raise self._error("has() takes one field", node, 'such as has(event.coupon); for a key use "key" in map')
        with self._block("try:"):
            operand = self._value(argument.operand)
            self._body.emit(f"return {self._call('has_field', operand, self._constant(argument.field, 'string')).text}")
        with self._block(f"except {self._helper('MissingField')}:"):
            self._body.emit("return False")

    # -- Macros --

    def _is_macro(self, node: Call) -> bool:
        return node.name in _MACROS and not self._is_namespace(node.target)

    def _macro(self, node: Call) -> None:
        counts = _MACROS[node.name]
        variable = node.arguments[0] if node.arguments else None
        if len(node.arguments) not in counts:
            message = f"{node.name} takes {_counted(counts[0], counts[-1])}, not {len(node.arguments)}"
            raise self._error(message, node, f"write {USAGE[node.name]}")
        if not isinstance(variable, Name):
            message = f"the first argument of {node.name} must be a name"
            raise self._error(message, node, f"write {USAGE[node.name]}")
        assert node.target is not None
        target = self._call("elements", self._value(node.target)).text
        self._loop_variables += 1
        python_name = f"l{self._loop_variables}"
        self._body.own_names.add(python_name)
        outer_scope = self._scope
        self._scope = {**outer_scope, variable.name: python_name}
        self._loops += 1
        head = f"for {python_name} in {target}:"
        match node.name:
            case "all" | "exists":
                self._quantifier(node, head)
            case "exists_one":
                self._exists_one(node, head)
            case _:
                self._collect(node, head)
        self._loops -= 1
        self._scope = outer_scope

    def _quantifier(self, node: Call, head: str) -> None:
        decisive, neutral = ("False", "True") if node.name == "all" else ("True", "False")
        self._body.emit("failure = None")
        with self._block(head), self._absorbing(), self._run_of_code():
            self._decide(node.arguments[1], node.name, decisive, neutral)
        self._raise_failure()
        self._body.emit(f"return {neutral}")

    def _exists_one(self, node: Call, head: str) -> None:
        self._body.emit("found = once = False")
        with self._block(head), self._run_of_code():
            condition = self._condition(node.arguments[1], node.name)
            with self._block(f"if {condition}:"):
                self._body.emit("once = not found")
                self._body.emit("found = True")
        self._body.emit("return once")

    def _collect(self, node: Call, head: str) -> None:
        """`map(x, value)`, `map(x, condition, value)`, `filter(x, condition)`."""
        self._body.emit("result = []")
        with self._block(head), self._run_of_code():
            if node.name == "map" and len(node.arguments) == 2:
                self._body.emit(f"result += ({self._value(node.arguments[1]).text},)")
            else:
                condition = self._condition(node.arguments[1], node.name)
                kept = node.arguments[2] if node.name == "map" else node.arguments[0]
                with self._block(f"if {condition}:"), self._run_of_code():
                    self._body.emit(f"result += ({self._value(kept).text},)")
        self._body.emit("return result")

    # -- Nodes as values: text, after statements for what does not fit into it --

    def _value(self, node: Node) -> _Code:
        self._body.cost += 1
        match node:
            case Literal(value=value):
                return self._constant(value, _KINDS.get(type(value)))
            case Name():
                return self._name(node)
            case Select():
                return self._select(node)
            case Index(operand=operand, key=key):
                return self._call("index", self._value(operand), self._value(key))
            case Unary():
                return self._unary(node)
            case Relation():
                return self._relation(node)
            case Arithmetic():
                return self._arithmetic(node)
            case ListNode():
                return self._list(node)
            case MapNode(entries=entries):
                return self._call("make_map", *(self._value(part) for entry in entries for part in entry))
            case Call():
                return self._called(node)
        return self._outlined(node, "bool" if isinstance(node, Logic) else None)

    def _name(self, node: Name) -> _Code:
        if node.name in self._scope:
            return _Code(self._body.use(self._scope[node.name]))
        if node.name in VARIABLES:
            return self._variable(node.name)
        if node.name in TYPE_NAMES:
            return self._constant(TYPE_NAMES[node.name], "type")
        raise self._unknown_variable(node)

    def _variable(self, variable: str) -> _Code:
        name = self._body.use(variable)
        absent = f"{self._helper('absent_variable')}({name!r})"
        return _Code(f"({name} if {name} is not None else {absent})", None, 1)

    def _unknown_variable(self, node: Name) -> ExpressionError:
        before = self._source.text[max(0, node.position - 100) : node.position]
        hint = variable_hint(node.name, [*VARIABLES, *NAMESPACES, *self._scope], before)
        if node.name in FUNCTIONS or node.name in NAMESPACES:
            hint = f"{node.name} is a function"
        return self._error(f"unknown variable '{shown(node.name)}'", node, hint)

    def _select(self, node: Select) -> _Code:
        if timestamp_type := self._qualified_type(node):
            return self._constant(timestamp_type, "type")
        return self._call("select", self._value(node.operand), self._constant(node.field, "string"))

    def _qualified_type(self, node: Select) -> CelType | None:
        """Standard CEL's long names: google.protobuf.Timestamp and google.protobuf.Duration."""
        match node:
            case Select(operand=Select(operand=Name(name="google"), field="protobuf"), field="Timestamp" | "Duration"):
                return None if "google" in self._scope else TYPE_NAMES[node.field.lower()]
        return None

    def _unary(self, node: Unary) -> _Code:
        operand = self._value(node.operand)
        if node.operator == "-":
            if type(operand.constant) is Decimal:
                return self._constant(numbers.negate(operand.constant), "number")
            return self._call("negate", operand, kind="number")
        if operand.kind == "bool":
            return self._cut(_Code(f"(not {operand.text})", "bool", operand.nesting + 1))
        return self._call("invert", operand, kind="bool")

    def _relation(self, node: Relation) -> _Code:
        left, right = self._value(node.left), self._value(node.right)
        if node.operator == "in":
            return self._in(left, right)
        if node.operator in _COMPARISONS:
            return self._call(_COMPARISONS[node.operator], left, right, kind="bool")
        if left.is_constant and not right.is_constant:
            left, right = right, left
        equal = self._equal(left, right)
        if node.operator == "==":
            return equal
        return self._cut(_Code(f"(not {equal.text})", "bool", equal.nesting + 1))

    def _equal(self, left: _Code, right: _Code) -> _Code:
        """Python's own comparison where it means the same: only a str equals a str, and true is only True."""
        if right.is_constant and not left.is_constant:
            if type(right.constant) is str:
                return self._cut(_Code(f"({left.text} == {right.text})", "bool", left.nesting + 1))
            if right.constant is None or type(right.constant) is bool:
                return self._cut(_Code(f"({left.text} is {right.text})", "bool", left.nesting + 1))
            if type(right.constant) is Decimal:
                return self._call("equals_number", left, right, kind="bool")
        return self._call("equals", left, right, kind="bool", charged=True)

    def _in(self, needle: _Code, haystack: _Code) -> _Code:
        """Membership in a constant list of strings, or of numbers, is a look into a frozenset."""
        if haystack.is_constant and type(haystack.constant) is list:
            types = {type(element) for element in haystack.constant}
            if types == {str}:
                wanted = self._constant(frozenset(haystack.constant), None)
                name = self._body.temporary()
                self._body.emit(f"{name} = {needle.text}")
                test = f"({self._helper('type')}({name}) is {self._helper('str')} and {name} in {wanted.text})"
                return _Code(test, "bool", 2)
            if types == {Decimal}:
                wanted = self._constant(frozenset(haystack.constant), None)
                return self._call("number_in", needle, wanted, kind="bool")
        return self._call("is_in", needle, haystack, kind="bool", charged=True)

    def _arithmetic(self, node: Arithmetic) -> _Code:
        result = self._value(node.first)
        for operator, operand in node.rest:
            self._body.cost += 1
            right = self._value(operand)
            has_number = "number" in (result.kind, right.kind)
            if operator == "+" and has_number:
                result = self._call("add_numbers", result, right, kind="number")
            elif operator == "+":
                result = self._call("add", result, right, charged=True)
            else:
                kind = "number" if has_number or operator != "-" else None
                result = self._call(_ARITHMETIC[operator], result, right, kind=kind)
        return result

    def _list(self, node: ListNode) -> _Code:
        items = [self._value(item) for item in node.items]
        if all(item.is_constant for item in items):
            return self._constant([item.constant for item in items], "list")
        nesting = 1 + max(item.nesting for item in items)
        return self._cut(_Code(f"[{', '.join(item.text for item in items)}]", "list", nesting))

    # -- Calls --

    def _called(self, node: Call) -> _Code:
        target = node.target
        if target is None:
            if node.name == "has":
                return self._outlined(node, "bool")
            if node.name == "now" and not node.arguments:
                return self._variable("now")
            return self._library_call(node, node.name, FUNCTIONS.get(node.name), list(node.arguments))
        if self._is_namespace(target):
            assert isinstance(target, Name)
            name = f"{target.name}.{node.name}"
            return self._library_call(node, name, FUNCTIONS.get(name), list(node.arguments))
        if node.name in _MACROS:
            return self._outlined(node, "bool" if node.name in ("all", "exists", "exists_one") else "list")
        return self._library_call(node, node.name, METHODS.get(node.name), [target, *node.arguments])

    def _is_namespace(self, target: Node | None) -> bool:
        return isinstance(target, Name) and target.name in NAMESPACES and target.name not in self._scope

    def _library_call(self, node: Call, name: str, function: Function | None, arguments: list[Node]) -> _Code:
        is_method = node.target is not None and "." not in name
        # The target first: in set.contains(a, b) the unknown name is what to complain of.
        codes = [self._value(argument) for argument in arguments[:is_method]]
        if function is None:
            raise self._unknown_function(node, name, is_method)
        count = len(arguments) - is_method
        least = function.least - is_method
        most = None if function.most is None else function.most - is_method
        if count < least or (most is not None and count > most):
            usage = USAGE.get(name)
            raise self._error(f"{name} takes {_counted(least, most)}, not {count}", node, usage and f"write {usage}")
        codes += [self._value(argument) for argument in arguments[is_method:]]
        if folded := self._folded(function, codes):
            return folded
        if name == "matches" and codes[1].is_constant:
            return self._call("matches_constant", *codes, kind="bool", charged=True)
        return self._call(_library_name(name, is_method), *codes, kind=function.result, charged=function.charged)

    def _folded(self, function: Function, codes: Sequence[_Code]) -> _Code | None:
        """The value of a call with constants only, such as timestamp("2026-09-01"); an error waits for run time."""
        if function.charged or not all(code.is_constant for code in codes):
            return None
        try:
            return self._constant(function.implementation(*(code.constant for code in codes)), function.result)
        except EvaluationError:
            return None

    def _unknown_function(self, node: Call, name: str, is_method: bool) -> ExpressionError:
        known = [*METHODS, *_MACROS] if is_method else [*FUNCTIONS, "has", "now"]
        hint = function_hint(name, known)
        if is_method and name in FUNCTIONS:
            hint = f"call it as {USAGE.get(name, f'{name}(x)')}"
        elif not is_method and (name in METHODS or name in _MACROS):
            hint = f"call it as {USAGE.get(name, f'x.{name}(...)')}"
        elif name == "now":
            hint = "now takes no arguments"
        return self._error(f"unknown function '{shown(name)}'", node, hint)

    def _error(self, message: str, node: Node, hint: str | None = None) -> ExpressionError:
        return self._source.error(message, node.position, hint)


_KINDS: dict[type, str] = {bool: "bool", str: "string", Decimal: "number"}


def _counted(least: int, most: int | None) -> str:
    if most is None:
        return f"at least {least} argument{'s' if least != 1 else ''}"
    if least == most:
        return f"{least} argument{'s' if least != 1 else ''}"
    return f"{least} to {most} arguments"

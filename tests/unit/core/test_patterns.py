"""Expressions of strangers: they mean what they mean to `re`, end in time, and compile in one place."""

import ast
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantcli
from quantcli.checkpoint.config.settings import Settings
from quantcli.core.errors import InputError
from quantcli.core.untrusted import patterns
from quantcli.core.untrusted.patterns import Budget, Expression, glob_matches, globs, own
from quantcli.recipe.fields import REGEX
from quantcli.recipe.recipe import load_recipe
from quantcli.recipe.shipped import shipped_recipes
from quantcli.targets.compressed_tensors.config import read_groups
from quantcli.targets.compressed_tensors.matching import GroupMatcher
from quantcli.targets.gptq.config import read_config

SOURCE = Path(quantcli.__file__).parent
NAME = "model.layers.0.self_attn.q_proj"
BOMB = r"(?:.|..|...)*(?<=!)"
NAMES = [
    NAME, "model.layers.11.mlp.experts.7.down_proj", "lm_head", "language_model.layers.3.mlp.gate",
    "model.layers.1.mlp.gate_proj.weight", "a", "A", "aab", "a.1", "_", "a{e}", "{2}", "[a]", "a-b",
    "a\\b", "A01", "1", "10", "b[", "\u00e9a", "x=1,2", "a|b&&", "b{", "ab" * 32, "layers.layers", "e1",
]  # fmt: skip
# from configs of engines' checkpoints, and what both packages might read differently
EXPRESSIONS = [
    r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj", r"(?:.*\.)?layers\.[0-9]+\.mlp\.down_proj$",
    r".*lm_head", r"(.*\.experts)\.\d+\.(?:gate|up)_proj", r"model\.(\w+)\.(\d+)\.(.*)_proj",
    r"(?!.*(?:vision|audio)).*", r"(?=.*mlp)(?!.*down).*", r".*\.(?:0|1|3)\.self_attn\.[qkv]_proj$",
    r"(.*\.)?(layers|h)\.(\d+)\.(.*\.)?(experts|mlp)\.(\d+\.)?.*", r"(?:model\.)+layers.*", "(?i)A.*",
    "(?:a){e}", "a{e}", "(?:a)(?:{e<=1})?", "a{i}.*", "[[]a]", "[^[]*", "[]a]*", "[a-]+", "a{,2}b",
    "a{,}b", "a{}", "[|&]{2}", r"\101\x30\061", r"(a)\1b", r"(?P<n>a)(?P=n)b", r"(b)?(?(1)c|a.*)",
    "(ab)++", r"(?>a+)b", r"\bmodel\b.*", r".*\.(?:gate|up)_(?i:PROJ)", r"\N{DIGIT ONE}", r"(?s:.)*",
    "a|aab", "", r"[\[]a\]", "(?:a|b)*", "(a|b|ab)*", r"\{2\}", "{2}?", r"(?m)^a$", r"(?<=l)m_.*",
    r"\\|a\\b",
]  # fmt: skip
TOKENS = [
    "a", "b", "A", "1", "_", "-", ".", "*", "+", "?", "{e}", "{", "}", "{2}", "{,2}", "{1,}", "(",
    "(?:", ")", "|", "[", "]", "[ab]", "[^a]", "[[]", "[]a]", "[:alpha:]", "\\.", "\\d", "\\w", "\\b",
    "\\Z", "^", "$", "(?i)", "(?i:", "(?=", "(?!", "(?<=", "(?>", "(?P<n>", "(?P=n)", "\\1", "\\101",
    "\\x41", "e", "<=1", "++", "*?", ".*", "0", "&&", "\\\\",
]  # fmt: skip


def of_re(text):
    """What `re` makes of a text; None if it is not an expression, or looks like a mistake."""
    with suppress(re.error, FutureWarning):
        return re.compile(text)


def assert_same(text, names=NAMES):
    """Both ways to match, with and without a limit, give what `re` gives: spans and groups."""
    expected, found = re.compile(text), Expression(text)
    limited = Expression(text)
    limited._short = -1
    for name in names:
        for how in ("match", "fullmatch", "search"):
            wanted = getattr(expected, how)(name)
            for expression in (found, limited):
                match = getattr(expression, how)(name)
                assert (match and (match.span(), match.groups())) == (
                    wanted and (wanted.span(), wanted.groups())
                ), (text, name, how)
    assert found.groups == expected.groups


def test_expressions_mean_what_they_mean_to_re():
    for text in EXPRESSIONS:
        if of_re(text):
            assert_same(text)
        else:
            with pytest.raises(InputError, match="is not a regular expression"):
                Expression(text)
    assert sum(of_re(text) is None for text in EXPRESSIONS) == 2


def test_shipped_expressions_mean_what_they_mean_to_re():
    texts = [path.read_text() for path in shipped_recipes().values()]
    found = {text for recipe in texts for text in re.findall(rf"['\"]{REGEX}([^'\"]+)['\"]", recipe)}
    for text in found:
        assert_same(text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), min_size=2, max_size=8).map("".join))
def test_any_expression_means_what_it_means_to_re(text):
    if of_re(text):
        assert_same(text, NAMES[5:])
    else:
        with pytest.raises(InputError):
            Expression(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(", "is not a regular expression: missing )"), ("*", "not a regular expression: nothing"),
        (r"\p{L}", "is not a regular expression: bad escape"), ("(?R)", "not a regular expression"),
        ("[[a]", "is not a regular expression: Possible nested set"), ("(?<n>a)", "not a regular"),
        ("a" * 4001, "is too long"), ("(" * 51 + ")" * 51, "is too costly"),
        ("(" * 1900, "is too costly"), ("a{1000000000}", "is too costly"), ("a" + "{9}" * 2, "not a"),
        ("(?:(?:(?:a{999}){999}){999}){999}", "is too costly"), ("(a{1,999}){1,999}", "is too costly"),
        ("(?:" * 40 + "a" + "){1,9}" * 40, "is too costly"), ("a{" + "9" * 3000 + "}", "is too costly"),
        ("(?i)" + "[a-\uffff]" * 500, "has a range of characters beyond U+00FF"),
        (r"[\x00-\U0010ffff]" * 200, "has a range of characters beyond U+00FF"),
        ("(?x) a # {e}", "comments"), ("(?ix:a)", "comments"), ("(?#{e})a", "comments"),
    ],
)  # fmt: skip
def test_refused(text, reason):
    with pytest.raises(InputError) as caught:
        Expression(text, "config.json: quantization_config.ignore[3]", pattern=f"re:{text}")
    assert caught.value.what.startswith(f"`re:{text}"[:8])
    assert reason in caught.value.what
    assert len(caught.value.what) < 400
    assert caught.value.where == "config.json: quantization_config.ignore[3]"
    assert caught.value.fix


def test_all_expressions_of_a_list_have_a_limit_of_size():
    budget = Budget()
    for _ in range(32):
        Expression("a" * 4000, budget=budget)
    with pytest.raises(InputError, match="is too long"):
        Expression("a" * 4000, budget=budget)


@pytest.mark.parametrize("how", ["match", "fullmatch", "search"])
def test_a_bomb_is_stopped_with_its_place(how, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.01)
    expression = Expression(BOMB, "r.yaml:3", pattern=f"re:{BOMB}")
    assert getattr(expression, how)("a") is None
    with pytest.raises(InputError) as caught:
        getattr(expression, how)(NAME * 2)
    assert caught.value.what == f"`re:{BOMB}` takes too long to match `{NAME * 2}`"
    assert caught.value.where == "r.yaml:3"
    assert caught.value.fix == patterns.SIMPLER


@pytest.mark.parametrize(
    "text",
    ["(a+)+$", "(a|a)*$", "(a?){9}a{9}", "(a*){20}b", "(?:(?:a|b)c?)+x", r"(a)\1*\1*\1*b",
     "(?:ab)*+c", "(a){2,}b", r"(a)?(?(1)b|c)", ".*a.*a.*a.*a.*a.*b"],
)  # fmt: skip
def test_re_is_not_asked_what_it_may_answer_late(text, monkeypatch):
    """Of names as long as these: the package with a limit answers."""
    expression, name = Expression(text), "a" * 100
    assert expression._short < len(name)
    expected = re.compile("b|a*") if text.endswith("$") else None
    assert bool(expression.fullmatch(name)) is bool(
        expected or text == "(a?){30}a{30}" * (len(name) <= 60)
    )


@pytest.mark.parametrize(
    "text",
    [r".*_proj", r".*\.layers\.\d+\.mlp\.(gate|up)_proj", r"(?:.*\.)?layers\.[0-9]+\.x$", "a(b|c)?d"],
)
def test_usual_expressions_need_no_limit(text):
    assert Expression(text)._short > 100


def test_what_a_name_lacks_is_not_matched():
    for text, needed in {
        r".*\.mlp\.(gate|up)_proj": (".mlp.", "_proj"), "abc+d?e": ("ab", "e"), "a|b": (), "(?i)ab": (),
        r"\101bc": ("bc",), r"(ab)c\.": ("c.",), r"ab{0}c": ("a", "c"), r"x\x41y": ("x", "y"),
    }.items():  # fmt: skip
        assert Expression(text)._needed == needed, text


def test_slow_matches_add_up(monkeypatch):
    """By a clock of the test: a machine that is busy is no reason to refuse, an expression that is slow
    for many names is."""
    now, budget = [0.0], Budget()
    budget.clock = lambda: now[0]

    class Slow:
        def fullmatch(self, name):
            now[0] += 0.001 + patterns.SECONDS / 4

    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    expression = Expression("a", budget=budget)
    expression._quick = Slow()
    for _ in range(4):
        expression.fullmatch("a")
    assert budget.clock is time.thread_time  # from here on only this thread's time counts
    for _ in range(3):
        expression.fullmatch("a")
    with pytest.raises(InputError, match="`a` takes too long to match `a`"):
        expression.fullmatch("a")


def test_globs_end_by_themselves():
    many = globs(["*a" * 60 + "b", "*[ab]?" * 40 + "c", "x*y"])
    assert many.fullmatch("a" * 300) is None
    assert many.fullmatch("x." * 100 + "y")
    assert many.groups == 0
    assert glob_matches("a.[12].*", "a.1.b")
    assert not glob_matches("A*", "a")
    with pytest.raises(InputError, match=r"`\*a\*a.* is too long to match names with") as caught:
        globs(["*a" * 2001], "r.yaml:3")
    assert caught.value.where == "r.yaml:3"


def test_expressions_of_the_program_are_those_of_re():
    assert own(r"(a)\.b").fullmatch("a.b")[1] == "a"


def compiled_in(path):
    """Line numbers of calls that give `re` or `regex` a text that the module does not hold itself."""
    tree = ast.parse(path.read_bytes())
    constants = {target.id for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)
                 for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                 if isinstance(target, ast.Name)}  # fmt: skip

    def fixed(node):
        if isinstance(node, ast.IfExp):
            return fixed(node.body) and fixed(node.orelse)
        if isinstance(node, ast.JoinedStr):
            return all(
                fixed(part.value) for part in node.values if isinstance(part, ast.FormattedValue)
            )
        return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in constants)

    engines = {f"{module}.{name}" for module in ("re", "regex") for name in vars(re)} - {"re.escape"}
    for place in tree.body:
        if not isinstance(place, ast.Assign | ast.AnnAssign):  # those are made at the import
            for call in ast.walk(place):
                given = isinstance(call, ast.Call) and ast.unparse(call.func) in engines
                if given and not (call.args and fixed(call.args[0])):
                    yield call.lineno


def test_one_module_compiles_what_others_wrote():
    """By syntax: `re`, `regex` and `fnmatch` get no text from elsewhere."""
    found, engines = {}, []
    for path in SOURCE.rglob("*.py"):
        name, text = path.relative_to(SOURCE).as_posix(), path.read_text()
        if re.search(r"import (regex|fnmatch)|from (regex|fnmatch|re) import", text):
            engines.append(name)
        if re.search(r"\bre\.|\bfrom re\b", text) and (lines := [*compiled_in(path)]):
            found[name] = lines
    assert engines == ["core/untrusted/patterns.py"]
    assert found.keys() == {"core/untrusted/patterns.py"}, found


def test_the_search_for_compiled_texts_finds_them(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import re\nA = 'a'\nB = re.compile(A + 'b')\n"
        "def f(t):\n    re.match(A, t)\n    re.match(f'{A}b', t)\n    re.escape(t)\n    re.compile(t)\n"
        "    re.match(f'{A}{t}', t)\n    re.sub(A if t else t, '', t)\n    re.compile(pattern=t)\n"
    )
    assert [*compiled_in(path)] == [8, 9, 10, 11]


def in_ignore():
    block = {"format": "int-quantized", "config_groups": {}, "ignore": ["a", f"re:{BOMB}"]}
    GroupMatcher(read_groups(Settings(block)), {NAME}).ignored(NAME)


def in_dynamic():
    block = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "dynamic": {f"-:{BOMB}": {}}}
    read_config(Settings(block)).kind_for_engine(NAME)


def in_rule():
    rules = [{"match": "lm_head", "scheme": "keep"}, {"match": [f"re:{BOMB}"], "scheme": "keep"}]
    load_recipe({"target": "ascend", "rules": rules}).rule_of(NAME)


def in_siblings():
    rules = [{"match": "*", "scheme": "keep"}]
    recipe = load_recipe({"target": "ascend", "rules": rules, "siblings": [f"({BOMB})"]})
    recipe.siblings[0].key(NAME)


@pytest.mark.parametrize(
    ("matching", "where"),
    [
        (in_ignore, "config.json: quantization_config.ignore[1]"),
        (in_dynamic, "config.json: quantization_config.dynamic"),
        (in_rule, "the recipe, `rules.1`"),
        (in_siblings, "the recipe, `siblings.0`"),
    ],
)
def test_bombs_of_configs_and_recipes_are_stopped_with_their_place(matching, where, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.01)
    with pytest.raises(InputError, match="takes too long to match") as caught:
        matching()
    assert caught.value.where == where
    assert BOMB in caught.value.what
    assert NAME.partition(".self_attn")[0] in caught.value.what

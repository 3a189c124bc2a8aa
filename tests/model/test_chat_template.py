import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from turbosparse.errors import UserError
from turbosparse.model import chat_template
from turbosparse.model.chat_template import render_chat

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be <brief> & 'kind'."}, {"role": "user", "content": "Grüße\n😀 \u2028"}]
TEMPLATES = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if loop.index == 1 %}{% break %}{% endif %}{% endfor %}",
    "{{ messages | tojson(indent=2) }}\n\n  {%- set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}   \n",
    "{% macro f(x) %}[{{ x.upper().strip() }}]{% endmacro %}\n"
    "  {% if true %}\n{{ f(messages[-1].content) }}\n  {% endif %}\n",
    "{{ messages | map(attribute='role') | join(',') }}{{ missing is defined }}{{ tools }}{{ eos_token }}",
]


@pytest.fixture(scope="module")
def hf():
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(hf, template, prompt):
    expected = hf.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=prompt, tools=None
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert render_chat(template, MESSAGES, tokens=tokens, add_generation_prompt=prompt) == expected


@settings(max_examples=15, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=50))
def test_contents_pass_through_unchanged(content):
    assert render_chat("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content


def test_the_date_is_todays():
    text = render_chat("{{ strftime_now('%Y %m') }}", [])
    assert text in {time.strftime("%Y %m"), time.strftime("%Y %m", time.localtime(time.time() - 60))}


HOSTILE = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['sys'] }}",
    "init globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "attr filter": "{{ (messages | attr('__class__')).mro() }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "changes its input": "{{ messages.append(1) }}",
    "generator frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "syntax": "{% for %}",
    "undefined": "{{ nothing.at.all }}",
    "refuses": "{{ raise_exception('no system role\nhere') }}",
    "huge range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "huge string": "{{ 'x' * 10 ** 11 }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "long output": "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
    "one long piece": "{{ 'x' * 2000000 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "exit": "{{ exit() }}",
}
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ (9 ** (9 ** 9 ** 2)) % 7 }}",
}


def _refused(template):
    with pytest.raises(UserError) as caught:
        render_chat(template, MESSAGES)
    message = str(caught.value)
    assert message.startswith("The model's chat template failed: ")
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_is_one_sentence(case):
    started = time.monotonic()
    _refused(HOSTILE[case])
    assert time.monotonic() - started < chat_template.MAX_SECONDS + 2


@pytest.mark.parametrize("case", ENDLESS)
def test_an_endless_template_is_stopped(case, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1)
    started = time.monotonic()
    _refused(ENDLESS[case])
    assert time.monotonic() - started < 5


def test_what_the_template_says_reaches_the_user():
    assert "no system role here" in _refused(HOSTILE["refuses"])


def test_the_child_sees_nothing_of_the_environment(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert render_chat(CHATML, MESSAGES).startswith("<|im_start|>system")

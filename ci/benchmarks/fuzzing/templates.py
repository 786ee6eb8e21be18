"""Chat templates, and pieces of them: what published ones have, and what reaches for the machine or its time."""

from __future__ import annotations

TEMPLATES = (
    b"{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}<a>"
    b"{% endif %}",
    b"{%- set ns = namespace(found=false) -%}{%- for m in messages -%}{%- if loop.first and m.role != 'user' -%}"
    b"{{ raise_exception('no') }}{%- endif -%}{{ bos_token + m.content }}{%- endfor -%}{{ strftime_now('%d') }}",
    b"{{ ''.__class__.__mro__ }}",
    b"{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
)
WORDS = r"""
{{ messages[0] }}
{% for i in range(99999) %}x{% endfor %}
{{ 'x' * 99999 }}
{{ 1 // 0 }}
{% if
}}
|tojson
[-1]
.__class__
|attr('__class__')
{{ range(10**9) }}
{{ 10 ** 10 ** 10 }}
{% include 'x' %}
{% import '/etc/passwd' as x %}
{{ messages | map(attribute='content') | list }}
{{ '%999999999d' % 1 }}
{{ namespace.__init__ }}
{{ nothing.at.all }}
{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{{ cycler.__globals__ }}
{{ lipsum(999999) }}
{{ {}|tojson(indent=[]) }}
{{ dict(1) }}
{{ strftime_now('\ud800') }}
{{ 'a'.format(1) }}
{{ ''|indent(10**10) }}
{{ raise_exception('no') }}
((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((
{% if a %}
~ bos_token
{% break %}
{% generation %}
{% set messages = 1 %}
{{ '{0.__class__}'.format(1) }}
{{ messages|batch(0)|list }}
{{ 'x'|center(10**10) }}
{{ 'x'.ljust(10**10) }}
{{ [1]|sum(start='') }}
""".strip().split("\n")

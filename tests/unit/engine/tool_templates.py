"""Chat templates of the shapes that real families have, as far as tools, calls and reasoning go."""

HERMES = """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ m.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- elif m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant
{%- if m.reasoning_content %}
<think>
{{ m.reasoning_content }}
</think>{% endif %}
{%- if m.content %}
{{ m.content }}{% endif %}
{%- for call in m.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
"""Qwen's: arguments are an object, results share a user's turn, thinking can be switched off."""

LLAMA = """
{%- if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}<|im_start|>system
{{ date_string }}
{% for tool in tools or [] %}{{ tool | tojson(indent=4) }}

{% endfor %}{{ system }}<|im_end|>
{%- for m in messages %}
{%- if m.tool_calls is defined %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}
{%- set call = m.tool_calls[0].function %}<|im_start|>assistant
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|im_end|>
{%- elif m.role == 'tool' %}<|im_start|>ipython
{{ m.content | tojson }}<|im_end|>
{%- else %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Llama 3.1's: one call in a message."""

MISTRAL = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST]{{ m.content }}[/INST]
{%- elif m.tool_calls is defined and m.tool_calls is not none %}[CALLS][
{%- for call in m.tool_calls %}
{%- if not call.id is defined or call.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
{{- call.function | tojson | replace('}', '') }}, "id": "{{ call.id }}"}{{ '' if loop.last else ', ' }}
{%- endfor %}]
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | default('') | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
[RESULT]{{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/RESULT]
{%- else %}{{ m.content }}{{ eos_token }}
{%- endif %}
{%- endfor %}"""
"""Mistral's: ids of nine characters."""

DEEPSEEK = """
{%- for m in messages %}
{%- if m['role'] == 'user' %}<|im_start|>U:{{ m['content'] }}
{%- elif m['role'] == 'assistant' and m['content'] is none %}<|im_start|>A:
{%- for call in m['tool_calls'] %}{{ '<|call|>' + call['function']['name'] + '\\n' + call['function']['arguments'] }}
{%- endfor %}<|im_end|>
{%- elif m['role'] == 'assistant' %}<|im_start|>A:{{ m['content'].split('</think>')[-1] }}<|im_end|>
{%- elif m['role'] == 'tool' %}<|im_start|>R:{{ m['content'] }}<|im_end|>
{%- else %}{{ m['content'] }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>A:<think>
{% endif %}"""
"""DeepSeek's: arguments are a text, the content of a call is null, and tools are not shown."""

HARMONY = """
{%- if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}<|im_start|>system
Reasoning: {{ reasoning_effort }}{% for tool in tools or [] %}
type {{ tool.function.name }} = ({{ tool.function.parameters.properties | list | join(', ') }}){% endfor %}<|im_end|>
{%- set ns = namespace(name=none) %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
{%- if m.content and m.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}
{%- if m.content or m.thinking %}<|im_start|>analysis
{{ m.content or m.thinking }}<|im_end|>{% endif %}
{%- set ns.name = m.tool_calls[0].function.name %}<|im_start|>to={{ ns.name }}
{{ m.tool_calls[0].function.arguments | tojson }}<|im_end|>
{%- elif m.role == 'tool' %}
{%- if ns.name is none %}{{ raise_exception('no previous call') }}{% endif %}<|im_start|>{{ ns.name }}
{{ m.content | tojson }}<|im_end|>
{%- else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{% endif %}"""
"""gpt-oss's: effort, reasoning under the name `thinking`, and no result without a call before."""

XML = """
{%- macro shown(arguments) %}{% for key, value in arguments | items %}
<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>{% endfor %}{% endmacro %}
{%- if tools %}<|im_start|>system
{% for tool in tools %}<function><name>{{ tool.function.name }}</name>
{%- for name, field in tool.function.parameters.properties | items %}
<parameter>{{ name }}: {{ field.type }} {{ field.description or '' }}</parameter>{% endfor %}</function>
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call><function={{ call.function.name }}>{{ shown(call.function.arguments) }}
</function></tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Qwen3-Coder's: arguments by key and value."""

FAMILIES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "deepseek": DEEPSEEK,
    "harmony": HARMONY,
    "xml": XML,
}

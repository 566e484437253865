"""Chat templates copied verbatim from published checkpoints: data for the tests, not our own text."""

_IMAGES = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
)
_TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"

LLAVA = (  # llava-hf/llava-1.5-7b-hf and -13b-hf, llava-v1.6-vicuna-7b-hf and -13b-hf
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}" + _IMAGES + "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}" + _TEXTS + "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}" + _TEXTS + "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_UNMARKED = (  # the same without the generation marks around answers
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    + _IMAGES
    + "{# Render all text next #}"
    + _TEXTS
    + "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (  # llava-hf/llava-v1.6-mistral-7b-hf
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{# Render all images first #}"
    + _IMAGES
    + "{# Render all text next #}"
    + _TEXTS
    + "{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> '}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_OLD = MISTRAL.replace("</s> ", "<\\s> ")  # its first revision
INSTRUCT = (  # mistralai/Mistral-7B-Instruct-v0.2, its language model
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

_IN_CONTENT = "{% for content in message['content'] | selectattr('type', 'equalto', "
_SAID = _IN_CONTENT + "'text') %}"
_ONEVISION_START = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}" + _IN_CONTENT + "'image') %}{{ '<image>' }}{% endfor %}"
)
_ONEVISION_VIDEO = "{# Render all video then #}" + _IN_CONTENT + "'video') %}{{ '<video>' }}{% endfor %}"
_ONEVISION_MARKED = (
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}" + _SAID + "{{ '\n' + content['text'] }}{% endfor %}"
    "{% else %}" + _SAID + "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
)
_ONEVISION_UNMARKED = "{# Render all text next #}" + _SAID + "{{ '\n' + content['text'] }}{% endfor %}"
_ONEVISION_END = "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ONEVISION = _ONEVISION_START + _ONEVISION_VIDEO + _ONEVISION_MARKED + _ONEVISION_END  # llava-onevision-qwen2-*-hf
ONEVISION_UNMARKED = _ONEVISION_START + _ONEVISION_VIDEO + _ONEVISION_UNMARKED + _ONEVISION_END  # older copies
ONEVISION_PICTURES = _ONEVISION_START + _ONEVISION_MARKED + _ONEVISION_END
ONEVISION_FIRST = _ONEVISION_START + _ONEVISION_UNMARKED + _ONEVISION_END
CHATML = (  # Qwen/Qwen2-*-Instruct, its language model
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

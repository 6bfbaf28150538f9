"""Conversations, chat templates and a tokenizer with special tokens, for tests."""

import json

import tokenizers as library
from corpus import TEXT

SPECIAL = (
    "<|begin|>",
    "<|start_header|>",
    "<|end_header|>",
    "<|eot|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
)
# As Llama 3's: a header, the content without white space around it, the end of a turn; no blocks.
LLAMA = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header|>' + message['role'] + '<|end_header|>\n\n' }}{{- message['content'] | trim }}"
    "{{- '<|eot|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header|>assistant<|end_header|>\n\n' }}{%- endif %}\n"
)
# As Qwen's: tools first, calls as JSON, answers of tools in a user's turn; white space follows each turn.
QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\n# Tools' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}BEGIN
        {%- if message.content %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}{{- '\n<tool_call>\n' + call | tojson + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}END
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
QWEN, QWEN_BLOCKS = (
    QWEN.replace("BEGIN", begin).replace("END", end)
    for begin, end in (("", ""), ("{%- generation %}", "{%- endgeneration %}"))
)
LLAMA_BLOCKS = LLAMA.replace(
    "{{- message['content'] | trim }}{{- '<|eot|>' }}",
    "{%- if message.role == 'assistant' %}{% generation %}{{- message['content'] | trim }}{{- '<|eot|>' }}"
    "{%- endgeneration %}{%- else %}{{- message['content'] | trim }}{{- '<|eot|>' }}{%- endif %}",
)


def message(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


PLAIN = [
    [message("user", "Hi"), message("assistant", "Hello, world!")],
    [
        message("system", "Be brief."),
        message("user", "  What is\n2 + 2? "),
        message("assistant", " 4\n"),
        message("user", "Größe 汉字 😀?"),
        message("assistant", "😀 naïve"),
    ],
    [
        message("user", "<|eot|> and <|im_end|> are tokens"),
        message("assistant", "a"),
        message("assistant", "b b"),
    ],
    [message("user", "Say nothing"), message("assistant", ""), message("user", "Thanks")],
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}}]
CALLS = [
    message("user", "How large, how old?"),
    {"role": "assistant", "content": None, "tool_calls": [{"name": "größe", "arguments": {"of": "<é>"}}]},
    message("tool", "3 m"),
    message("tool", "4 y"),
    message("assistant", "3 m, 4 years."),
]


def tokenizer_json() -> str:
    """A byte-level BPE that has the special tokens."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    made.post_processor = library.processors.ByteLevel(trim_offsets=True)
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made.to_str()


def write_tokenizer(folder, template: str = "") -> str:
    """Writes a folder as a model's; returns what dataset.tokenizer is then."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    about = {
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "special": True},
        "eos_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(about if template else about | {"chat_template": None})
    )
    return f"tokenizers:{folder}/tokenizer.json"


def lines(conversations: list) -> str:
    """Lines of JSON, of lists of messages or of whole records."""
    records = [one if isinstance(one, dict) else {"messages": one} for one in conversations]
    return "".join(json.dumps(record) + "\n" for record in records)


def drawn(count: int, seed: int) -> list[list[dict]]:
    """Conversations of one to three turns, of words that are drawn from a seed."""
    import random

    draw = random.Random(seed)
    words = TEXT.split()

    def say(role: str) -> dict:
        return message(role, " ".join(draw.choices(words, k=draw.randint(1, 9))))

    return [
        [say("system")] * (i % 3 == 0)
        + [say(role) for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]
        for i in range(count)
    ]

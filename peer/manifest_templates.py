"""What `run new` writes: commented manifests that are valid as they are."""

from __future__ import annotations

from typing import Final

_COMMON_TAIL: Final = """
[schedule]
round_s = 5.0           # seconds of training between two averages; a slow peer does fewer steps
exchange_s = 20.0       # an exchange closes after this long, with whoever is in
fragments = 1           # parts of the state that take turns: exchanges so many times smaller
evaluate_every = 10     # rounds between two looks at the held-out text; 0: never
checkpoint_every = 10   # rounds between two full checkpoints
GOSSIP
[group]
members_max = 8         # near peers that average together; a larger group splits
aggregators_max = 8     # at most this many of them share the work of averaging
quorum = 0.5            # share of the group that must be in for an average to count
"""

TEMPLATE: Final = """\
# A run of Murmuration: everything its peers must agree on. Check it, then start it:
#     python -m peer run check FILE
#     python -m peer run start FILE
# Paths are relative to this file. Others get hashes and file contents, never your paths.

name = "my run"

[model]
# A transformers config, trained from scratch. To start from weights you have, delete
# [model.config] and write instead:   folder = "path/to/a/saved/model"
tokenizer = "bytes"     # or the path of a tokenizer.json
seed = 0                # of the first weights

[model.config]
model_type = "llama"    # or qwen2 qwen3 mistral gemma gemma2 gpt2 gpt_neox phi phi3 olmo2
vocab_size = 320        # 257 are used by the bytes tokenizer
hidden_size = 256
intermediate_size = 688
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 4
max_position_embeddings = 1024
tie_word_embeddings = true

[data]
source = "stdlib"       # this Python's own sources; or text, jsonl, parquet, hf, chat
# paths = ["books", "more.txt"]  # files or folders; up to 16 MiB in all travel to joiners,
#                                # of larger data each peer brings its own (--data)
# fields = ["text"]              # jsonl, parquet, hf: what to read of each record
# dataset = "owner/name"         # hf: needs the extra `hub`
sequence_length = 128   # tokens in a sample
block_samples = 32      # samples in a block; peers share out blocks
validation_share = 0.02 # held out, never trained on
validation_samples = 64 # at most this many are evaluated

[method]
kind = "pretrain"       # all weights; `run new --method` lora, hybrid and zo show other kinds

[inner]                 # AdamW, each peer on its own
lr = 2e-3
betas = [0.9, 0.95]
weight_decay = 0.1
grad_clip = 1.0
warmup_steps = 20
batch_size = 8          # samples in a step

[outer]                 # Nesterov momentum on the averaged update
lr = 0.7
momentum = 0.5          # 0.9 where a round has hundreds of steps

[codec]
name = "q4"             # how updates travel: 3.1 bits a value; or low, min, high, fp32 ...
""" + _COMMON_TAIL.replace(
    "GOSSIP", "gossip_every = 10       # rounds between two mixes with another group\n"
)

LORA_TEMPLATE: Final = """\
# A finetuning run of Murmuration: low-rank adapters on frozen weights. Check it, then start it:
#     python -m peer run check FILE
#     python -m peer run start FILE --data FILES
# Paths are relative to this file. Others get hashes and file contents, never your paths.

name = "my finetuning"

[model]
# folder = "path/to/a/saved/model"   # what save_pretrained wrote: config.json, *.safetensors and
#                                    # tokenizer.json. Use it instead of [model.config], which is
#                                    # an untrained stand-in that lets this file start as it is.
seed = 0

[model.config]
model_type = "llama"
vocab_size = 320
hidden_size = 128
intermediate_size = 344
num_hidden_layers = 2
num_attention_heads = 4
max_position_embeddings = 1024
tie_word_embeddings = true

[data]
source = "chat"         # questions and answers, of which the answers are learned: JSONL with
#                         messages, conversations, instruction and output, prompt and completion,
#                         or question and answer; or plain text, jsonl, parquet, hf, stdlib
# paths = ["train.jsonl"]            # files or folders; up to 16 MiB travel to joiners. Without,
#                                    # each peer brings its own: --data FILES
sequence_length = 512   # tokens in a sample; short conversations share one, long ones take several
block_samples = 8
validation_share = 0.02 # of the rows, by the hash of what they ask; never trained on

[method]
kind = "lora"
rank = 8                # the rank of every adapter
alpha = 16.0            # adapters are scaled by alpha / rank
# targets = ["q_proj", "v_proj"]     # layers that get an adapter; left out: all linear ones
dropout = 0.0

[evaluation]            # what the group's members score between them, every evaluate_every rounds
rows = 32               # at most, each; 0: nobody does
# paths = ["questions.jsonl"]        # that nobody trains on; left out: what each holds out
answer_tokens = 0       # to count exact matches: the longest answer that the model may give

[inner]                 # AdamW, each peer on its own
lr = 5e-4
weight_decay = 0.0
warmup_steps = 10
batch_size = 4
""" + _COMMON_TAIL.replace(
    "GOSSIP", "gossip_every = 0        # groups of adapters can't be mixed yet\n"
)

HYBRID_TEMPLATE: Final = (
    LORA_TEMPLATE.replace(
        "# A finetuning run of Murmuration: low-rank adapters on frozen weights.",
        "# A finetuning run of Murmuration to which each peer adds by its own means.",
    )
    .replace('name = "my finetuning"', 'name = "my hybrid finetuning"')
    .replace(
        """kind = "lora"
rank = 8                # the rank of every adapter
alpha = 16.0            # adapters are scaled by alpha / rank
""",
        """kind = "hybrid"         # each peer trains what it can afford, or what its --method says:
#                         lora:RANK, zo:P (without gradients, P directions a step), full
rank = 8                # of what comes out, and the most that a peer may send
alpha = 16.0            # a peer's adapters are scaled by alpha / its own rank
admit = ["dense", "lowrank", "seeds", "sparse"]  # what may be sent: full, lora, zo, full
effective_dim = 100.0   # d: a zo peer counts P / (d + P) of its tokens
seeds_lr = 0.01         # how far a zo peer goes in a step
spectrum = 1.0          # below 1, what few peers learned counts more: 0.4 with many local steps
step = 1.0              # the mean change is taken so many times
""",
    )
    .replace(
        """
[schedule]""",
        """
[codec]
name = "q4"             # how what peers add travels, 3.1 bits a value; fp32: exactly

[schedule]""",
    )
)

ZO_TEMPLATE: Final = """\
# A zeroth-order run of Murmuration: finetuning by forward passes alone, in the memory that it takes
# to run the model; a round costs each peer a hundred bytes. Check it, then start it:
#     python -m peer run check FILE
#     python -m peer run start FILE
# Paths are relative to this file. Others get hashes and file contents, never your paths.

name = "my phones"

[model]
# folder = "path/to/a/saved/model"   # what save_pretrained wrote: config.json, *.safetensors and
#                                    # tokenizer.json. Use it instead of [model.config], which is
#                                    # an untrained stand-in that lets this file start as it is.
seed = 0                # of all directions too

[model.config]
model_type = "llama"
vocab_size = 320
hidden_size = 128
intermediate_size = 344
num_hidden_layers = 2
num_attention_heads = 4
max_position_embeddings = 1024
tie_word_embeddings = true

[data]
source = "stdlib"       # this Python's own sources; or chat (questions and answers), text, jsonl,
#                         parquet, hf
# paths = ["train.jsonl"]            # files or folders; up to 16 MiB travel to joiners. Without,
#                                    # each peer brings its own: --data FILES
sequence_length = 128   # tokens in a sample
block_samples = 8
validation_share = 0.02 # held out, never trained on

[method]
kind = "zo"
rank = 8                # of every adapter
alpha = 16.0            # adapters are scaled by alpha / rank
# targets = ["q_proj", "v_proj"]     # layers that get an adapter; left out: all linear ones

[zeroth]
estimator = "decomfl"   # new directions in each round; or kseed, a fixed pool of them
adapters = true         # false: all weights
perturbations = 8       # directions in a local step, two runs of the model each
steps = 1               # local steps; perturbations x steps scalars travel, two bytes each
eps = 1e-2              # how far along a direction the loss is measured; 1e-3 for all weights
noise = "gaussian"      # or rademacher, which is quicker
reduction = "mean"      # by tokens; or median or trimmed, which a few liars can't move far

[inner]
lr = 0.01               # of this stand-in. For adapters of a real model 1e-4, for all weights 1e-6
batch_size = 8          # samples behind each scalar
""" + _COMMON_TAIL.replace("GOSSIP", "gossip_every = 0        # groups of logs can't be mixed\n")

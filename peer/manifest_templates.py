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
source = "stdlib"       # this Python's own sources; or text, jsonl, parquet, hf
# paths = ["books", "more.txt"]  # files or folders; up to 16 MiB in all travel to joiners,
#                                # of larger data each peer brings its own (--data)
# fields = ["text"]              # jsonl, parquet, hf: what to read of each record
# dataset = "owner/name"         # hf: needs the extra `hub`
sequence_length = 128   # tokens in a sample
block_samples = 32      # samples in a block; peers share out blocks
validation_share = 0.02 # held out, never trained on
validation_samples = 64 # at most this many are evaluated

[method]
kind = "pretrain"       # all weights; `run new --method lora` shows the other kind

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
#     python -m peer run start FILE
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
source = "stdlib"       # or text, jsonl, parquet, hf
# paths = ["train.jsonl"]            # up to 16 MiB travel to joiners; else each brings its own
# fields = ["question", "answer"]    # of each record, joined by a line feed
sequence_length = 256
block_samples = 8

[method]
kind = "lora"
rank = 8                # the rank of every adapter
alpha = 16.0            # adapters are scaled by alpha / rank
# targets = ["q_proj", "v_proj"]     # layers that get an adapter; left out: all linear ones
dropout = 0.0

[inner]                 # AdamW, each peer on its own
lr = 5e-4
weight_decay = 0.0
warmup_steps = 10
batch_size = 4
""" + _COMMON_TAIL.replace(
    "GOSSIP", "gossip_every = 0        # groups of adapters can't be mixed yet\n"
)

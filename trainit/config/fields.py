"""Every field of a config: its default, what it is, its bounds. Choices of whole groups are in `groups`."""

import dataclasses
from typing import Any

from ml_collections import FrozenConfigDict

from trainit.config.schema import DURATION, ConfigDict, Field, field

MESH_AXES = ("data", "fsdp", "tensor", "context")  # the last ones vary fastest: they stay inside a node
VOCABULARY_MULTIPLE = 128  # the vocabulary is padded to it: matrix units like it, and so do tensor shards
DROPOUTS = ("gpt_dropout", "attn_dropout", "attn_linear_dropout", "transformer_dropout")
PRECISIONS = ("bfloat16", "float16", "float32")
PART_PRECISIONS = ("", *PRECISIONS, "float8")
STATE_TYPES = ("bfloat16", "float32", "int8")
GATED = ("swiglu", "geglu")  # activations of MLPs with two maps from the model's width
KERNELS = ("auto", "plain", "blockwise", "cudnn", "gather", "ring")
PLATFORMS = ("", "cpu", "cuda", "rocm", "tpu")
TRACKERS = ("tensorboard", "wandb")
TOKENIZERS = "bytes, gpt2, gpt2:FOLDER, sentencepiece:FILE, tokenizers:FILE"

Config = FrozenConfigDict  # a resolved config, or a part of one


def defaults() -> ConfigDict:
    """Returns a config with every field except the optimizer's, which its own file declares."""
    c = ConfigDict()
    # What is trained, and for how long.
    c.seed = field(42, "of parameters, dropout and data order", at_least=0, below=2**32)
    c.steps = field(50_000, "optimizer steps of the whole run", above=0, below=2**31)
    c.max_minutes = field(0.0, "minutes after which the run saves and exits with 75; 0: no limit", at_least=0)
    c.batch_size = field(128, "sequences of an optimizer step; a multiple of mesh.data * mesh.fsdp", above=0)
    c.batch_schedule = field("", "later batch sizes, as in '20%: 256; 2e9 tokens: 512'; empty: none")
    c.device_batch_size = field(16, "most sequences of a device in a micro-step; 0: no bound", at_least=0)
    logits = "most MiB of float32 logits in a device's memory; 0: no bound; auto: by device and memory"
    c.logits_mib = field("auto", logits, types=(str, float), at_least=0)
    c.z_loss = field(0.0, "weight in the loss of log(the softmax's denominator)^2; 0: none", at_least=0)
    c.clip_norm = field(10.0, "maximum of the gradient's global l2 norm; 0: no clipping", at_least=0)
    c.stall_seconds = field(300.0, "seconds, or 20 steps, without a step: end the run; 0: never", at_least=0)
    c.max_skipped = field(15, "steps in a row, non-finite or spikes, that stop the run", above=0)
    # In which precision, and on which devices.
    c.precision = field("bfloat16", "of matrix products and activations", one_of=PRECISIONS)
    c.precision_of = field(ConfigDict(), "precision of single parts; empty: as `precision`")
    c.precision_of.attention = field("", "its products; its scores, unless float8", one_of=PART_PRECISIONS)
    c.precision_of.mlp = field("", "its two or three products", one_of=PART_PRECISIONS)
    c.precision_of.head = field("", "the output head's product", one_of=("", *PRECISIONS))
    c.platform = field("", "devices to use; empty: the best there are", one_of=PLATFORMS)
    c.cpu_devices = field(1, "virtual devices where there is no accelerator", above=0, at_most=4096)
    c.mesh = field(ConfigDict(), "devices along each axis; above 0, and for one of them -1: what is left")
    c.mesh.data = field(1, "replicas, each with a part of the batch")
    c.mesh.fsdp = field(-1, "parts of parameters, optimizer state and the batch")
    c.mesh.tensor = field(1, "parts of heads, MLP width, vocabulary, and of the residual's length")
    c.mesh.context = field(1, "parts of each sequence, twice as many chunks of it")
    # The model, its optimizer and its data.
    c.model = field(model(), "the GPT")
    c.optimizer = field(ConfigDict(), "the optimizer; its file declares its fields")
    c.optimizer_files = field("", "hash of optimizer files outside the package; filled at the start")
    c.optimizer_state = field("float32", "type of the optimizer's arrays between steps", one_of=STATE_TYPES)
    c.parameter_groups = field((), "lines 'PATTERN FIELD=VALUE ...': settings of parameters by their paths")
    c.schedule = field(schedule("linear", **LINEAR), "the learning rate over the run, as a part of the peak")
    c.dataset = field(dataset("data/pile"), "the text to train and validate on")
    _measured_and_kept(c)
    return c


def _measured_and_kept(c: ConfigDict) -> None:
    """Adds the fields of what a run measures and keeps, and of what becomes of it after a fault."""
    c.spikes = field(ConfigDict(), "loss spikes")
    c.spikes.skip_deviations = field(0.0, "deviations above the mean that skip a step; 0: none", at_least=0)
    c.spikes.window = field(128, "steps before, whose mean and deviation count", at_least=2)
    c.spikes.skip_data = field("", "steps FROM:TO, ... whose batches are left out, as in '1003:1010'")
    c.eval = field(ConfigDict(), "validation")
    c.eval.every_steps = field(1000, "steps between validations; 0: only at the end", at_least=0)
    c.eval.sequences = field(1024, "validation sequences, evenly spaced, always the same; 0: all", at_least=0)
    c.eval.first = field(False, "validate on the first of them, not on evenly spaced ones")
    c.eval.tasks = field((), "files of questions with choices, FILE or NAME=FILE, that the model answers")
    c.eval.prompts = field((), "texts that are continued at each validation, into samples.jsonl; empty: none")
    c.eval.length = field(64, "most tokens that are added to each of them", above=0)
    c.log = field(ConfigDict(), "the log of metrics")
    c.log.every_steps = field(1, "steps between lines of metrics.jsonl", above=0)
    c.checkpoint = field(ConfigDict(), "saving and loading")
    c.checkpoint.save_steps = field(1000, "every N steps; N, M: at these; 0: at the end", types=(int, tuple))
    c.checkpoint.keep = field(3, "newest checkpoints that stay; 0: all", at_least=0)
    c.checkpoint.local_steps = field(0, "keep a snapshot on the hosts every N steps; 0: never", at_least=0)
    c.checkpoint.local_folder = field("", "folder of each host for snapshots; empty: in TMPDIR, or /tmp")
    c.checkpoint.fallback = field(False, "if the newest is damaged: continue from the newest whole one")
    c.checkpoint.rewind = field(False, "go back to before a range that is new in spikes.skip_data")
    c.checkpoint.load_path = field("", "another run's folder, or hf:FOLDER, to start from at first")
    c.checkpoint.load_step = field(-1, "step of the checkpoint in load_path; -1: the newest", at_least=-1)
    c.checkpoint.overwrite_config = field(False, "resume with this config where the checkpoint's differs")
    c.checkpoint.overwrite_optimizer = field(False, "load only parameters and data position from load_path")
    c.check = field(ConfigDict(), "comparisons of what devices compute and keep")
    c.check.every_steps = field(0, "steps between comparisons of devices; 0: none", at_least=0)
    c.restart = field(ConfigDict(), "what launch scripts do when a process fails or is lost")
    c.restart.limit = field(0, "times to start all again, from the newest checkpoint; 0: never", at_least=0)
    c.restart.shrink = field(False, "continue on fewer hosts if there are no more, and the mesh fits there")
    c.profile = field(ConfigDict(), "traces of steps on the devices")
    c.profile.steps = field("", "steps FROM:TO, ... to trace, as in '100:105'; empty: none")
    c.profile.count = field(5, "steps of a trace that SIGURG or a file trace_PROCESS asks for", above=0)
    c.profile.processes = field((0,), "processes that trace, unless a file asks them; empty: all")
    c.diagnostics = field(diagnostics(every_steps=0), "statistics of the trajectory")
    c.trackers = field((), "where metrics go, too: tensorboard, wandb; empty: wandb, if wandb.project is set")
    c.wandb = field(ConfigDict(), "Weights & Biases")
    c.wandb.project = field("", "project to log to; empty: no W&B")
    c.wandb.name = field("", "name of the run; empty: the run folder's")


def model(**changes: Any) -> ConfigDict:
    """Returns GPT-2 124M (Radford et al. 2019) with an untied head and the given changes."""
    m = ConfigDict()
    # Sizes.
    m.dim = field(768, "width of the residual stream; a multiple of num_heads and mesh.fsdp", above=0)
    m.num_heads = field(12, "query heads; a multiple of mesh.tensor", above=0)
    m.num_kv_heads = field(0, "key and value heads, a divisor of num_heads; 0: num_heads", at_least=0)
    m.head_dim = field(0, "size of a head; 0: dim / num_heads", at_least=0)
    m.num_blocks = field(12, "layers", above=0)
    m.context_length = field(1024, "tokens of a sequence; a multiple of mesh.tensor * mesh.context", above=0)
    m.mlp_dim = field(0, "width of the MLP; 0: 4 * dim (gated: 8/3 * dim, a multiple of 64)", at_least=0)
    m.vocab_size = field(0, "rows of the embedding; 0: the tokenizer's, up to a multiple of 128", at_least=0)
    _architecture(m)
    # How it is computed; none of these changes the result.
    kernels = "auto: cudnn, else blockwise; over mesh.context gather up to 16384 tokens, else ring"
    m.attention = field("auto", kernels, one_of=KERNELS)
    m.remat = field(
        "auto",
        "what is computed again, not kept; auto: by device and memory; none: only what is cheap, norms and "
        "activations; attention: only scores; dots: all except matrix products; block: all except a layer's "
        "input; offload: as dots, with products in host memory",
        one_of=("auto", "none", "attention", "dots", "block", "offload"),
    )
    loop = "one compiled layer in a loop; False: all layers compiled one after another; auto: as remat"
    m.scan_layers = field("auto", loop, types=(str, bool), one_of=("auto", True, False))
    m.update(changes)
    return m


def _architecture(m: ConfigDict) -> None:
    """Adds the fields that say what a model computes, of these sizes."""
    m.norm = field("layernorm", "normalization", one_of=("layernorm", "rmsnorm"))
    placements = ("before", "after", "both")
    m.norm_placement = field("before", "norms of what blocks read, of results, or both", one_of=placements)
    scales = "norms that learn a scale: all; or blocks: not those of qk_norm; or none"
    m.norm_scale = field("all", scales, one_of=("all", "blocks", "none"))
    m.embedding_norm = field(False, "a norm of what the first block reads, too")
    m.norm_unit_offset = field(False, "norms multiply by 1 + scale, which starts from 0")
    m.norm_epsilon = field(1e-5, "added to the mean square by whose root norms divide", above=0)
    m.parallel_residual = field(False, "attention and MLP of a layer read the same residual stream")
    activations = ("gelu", "gelu_exact", "relu2", *GATED)
    m.activation = field("gelu", "of the MLP; gelu and geglu in its tanh form", one_of=activations)
    m.positions = field("learned", "position encoding", one_of=("learned", "rope"))
    m.rope_theta = field(10_000.0, "base wavelength of RoPE in radians", above=0)
    m.rope_interleaved = field(False, "RoPE turns pairs (2i, 2i + 1) of a head, not (i, i + half of them)")
    m.rotary_fraction = field(1.0, "part of each head that RoPE turns, the first", above=0, at_most=1)
    m.rope_scaling = field(ConfigDict(), "RoPE for longer contexts than those of the first training: Llama 3")
    m.rope_scaling.factor = field(1.0, "by which low frequencies are divided; 1: no scaling", at_least=1)
    m.rope_scaling.original_context = field(8192, "tokens of a sequence before", above=0)
    m.rope_scaling.low_frequency_factor = field(1.0, "turns in that context of low ones, at most", above=0)
    m.rope_scaling.high_frequency_factor = field(4.0, "turns from which on nothing is divided", above=0)
    m.use_bias = field(True, "biases of the blocks' linear maps and of LayerNorm")
    m.qkv_bias = field(False, "biases of queries, keys and values even without use_bias")
    m.head_bias = field(False, "bias of the output head")
    m.qk_norm = field(False, "RMSNorm on each head's queries and keys")
    m.qk_norm_over_heads = field(False, "qk_norm takes all heads together, with a scale for each number")
    m.embedding_scale = field(1.0, "what blocks read first is multiplied by it; 0: sqrt(dim)", at_least=0)
    m.tied_embeddings = field(False, "the head is the token embedding")
    m.document_mask = field(False, "attention stays within a document, where positions start from 0 again")
    m.end_of_text = field(-1, "id that ends a document, for document_mask; -1: the tokenizer's; -2: no id")
    m.window = field(0, "keys that a query sees, its own the last; 0: all before it", at_least=0)
    m.window_layers = field(":", "layers with it, as slices: '::2' each second, '0, 4:' the first, 4 on")
    m.attention_scale = field(0.0, "scores: queries times keys times this; 0: 1/sqrt(head_dim)", at_least=0)
    m.attention_softcap = field(0.0, "scores pass through cap * tanh(scores / cap); 0: not", at_least=0)
    m.logit_softcap = field(0.0, "logits pass through cap * tanh(logits / cap); 0: they do not", at_least=0)
    forms = "of logit_softcap; rsqrt: logits / sqrt(1 + (logits / cap)^2)"
    m.softcap_form = field("tanh", forms, one_of=("tanh", "rsqrt"))
    begin = "zero_outputs: kernels N(0, 0.33 / inputs), those of results and the head 0, embeddings N(0, 1)"
    m.init = field("gpt2", begin, one_of=("gpt2", "zero_outputs"))
    m.init_std = field(0.02, "standard deviation of initial weights, for init=gpt2", above=0)
    m.gpt_dropout = field(0.0, "dropout of the sum of embeddings", at_least=0, below=1)
    m.attn_dropout = field(0.0, "dropout of attention weights", at_least=0, below=1)
    m.attn_linear_dropout = field(0.0, "dropout of attention's output", at_least=0, below=1)
    m.transformer_dropout = field(0.0, "dropout of the MLP's output", at_least=0, below=1)


def dataset(path: str) -> ConfigDict:
    """Returns the fields of a prepared dataset, or of tokens that another program wrote."""
    d = ConfigDict()
    d.path = field(path, "prepared dataset, or another program's tokens; 'demo': presidents' messages")
    d.validation_path = field("", "validation tokens of another program; empty: next to those to train on")
    d.tokenizer = field("", f"of another program's tokens: {TOKENIZERS}")
    d.end_of_text = field("", "token that ends a text; empty: the one that the tokenizer's files name")
    d.mixture = field("", "weights of subsets and folders: 'Github 0.3, data/web 0.7; 50%: ...'; empty: all")
    order = "shuffled: another in each epoch; blocks: neighbours stay near; sequential: as on the disk"
    d.order = field("shuffled", order, one_of=("shuffled", "blocks", "sequential"))
    d.block_tokens = field(1 << 24, "tokens of a block, for order=blocks", above=0)
    d.whole_batches = field(False, "read only whole batches (of batch_size) of each shard, not its rest")
    d.workers = field(0, "worker processes of the loader; 0: a thread of the process itself", at_least=0)
    d.prefetch = field(2, "batches that are read ahead", above=0)
    return d


def jsonl(path: str = "pile/train", validation_path: str = "pile/val.jsonl.zst") -> ConfigDict:
    """Returns the fields of JSON lines that are tokenized while they are read."""
    d = dataset(path)
    d.path = field(path, "a file, a glob or a folder of .jsonl, .jsonl.zst and .jsonl.gz")
    d.validation_path = field(validation_path, "the same for validation; eval.sequences of it are in memory")
    d.tokenizer = field("gpt2", TOKENIZERS)
    d.text_field = field("text", "dotted path of the text in a line's JSON")
    d.subset_field = field("meta.pile_set_name", "dotted path of the subset, by which validation is reported")
    d.streams = field(16, "parts of the data, each read by one worker; a divisor of all batch sizes", above=0)
    d.window = field(256, "sequences of a stream that are shuffled among themselves", above=0)
    d.workers = field(2, "worker processes of each process of the job", at_least=0)
    return d


def chat(path: str = "chat/train", validation_path: str = "chat/val.jsonl") -> ConfigDict:
    """Returns the fields of conversations in JSON lines, of which what the assistant writes counts."""
    d = jsonl(path, validation_path)
    d.text_field = field("messages", "dotted path of the messages in a line's JSON")
    d.subset_field = field("", "dotted path of the subset, by which validation is reported; empty: none")
    d.template = field("", "chat template: a file, or chatml; empty: the tokenizer's, else chatml")
    d.date = field("2024-07-26", "the day that templates take for today")
    return d


def diagnostics(every_steps: int = 1, **changes: Any) -> ConfigDict:
    """Returns statistics of the trajectory: by default all except the costly ones that need a choice."""
    d = ConfigDict()
    d.every_steps = field(every_steps, "steps between measurements; 0: none, and no cost", at_least=0)
    d.norms = field(True, "l1, l2, max of parameters, gradients, updates; updates' ratio to parameters")
    d.norms_by = field(("kind",), "these norms also by kind, layer, parameter")
    d.last_gradient = field(True, "keeps the last gradient: product and cosine with it")
    d.past_gradients = field(True, "keeps a sum of all past gradients: product and cosine with it")
    d.last_parameters = field(True, "keeps the last parameters: product and cosine with how they have moved")
    d.last_loss = field(True, "by how much the last update changed the loss of this batch; a forward pass")
    d.spectra = field("", "pattern of whole paths of matrices: spectral norm, effective rank; empty: none")
    d.histograms = field("", "pattern of whole paths: histograms of these and their gradients, updates")
    d.noise_scale = field(False, "gradient noise scale; needs two micro-steps")
    d.update(changes)
    return d


LINEAR = {"warmup": "10%", "constant": 0, "final": 0.0}
_SCHEDULE_FIELDS: dict[str, Field] = {
    "warmup": field(0, "duration of the rise from 0 to the peak", types=DURATION),
    "constant": field(0, "duration at the peak, after which the rate falls", types=DURATION),
    "decay": field(0, "duration of the last, straight way down", types=DURATION),
    "final": field(0.0, "value at the end, as a fraction of the peak", at_least=0),
    "cycles": field(1, "number of cosine waves", above=0, types=(int, float)),
    "exponent": field(0.5, "the rate falls with this power of the step", above=0),
    "boundaries": field((), "durations after which `values` are reached", types=(tuple, *DURATION)),
    "values": field((), "fractions of the peak, with straight lines between them", types=(tuple, int, float)),
    "rewarm_at": field((), "durations after which the rate starts from 0 again", types=(tuple, *DURATION)),
    "rewarm": field("1%", "duration of the rise after each of them", types=DURATION),
}


def schedule(name: str, **values: Any) -> ConfigDict:
    """Returns a schedule of this name with the given fields and those of all schedules.

    Durations are steps (500), percent of all steps ("10%") or tokens ("2e9 tokens").
    """
    s = ConfigDict()
    s.name = field(name, "shape of the schedule; chosen as a group")
    for key, value in {**values, "rewarm_at": (), "rewarm": "1%"}.items():
        s[key] = dataclasses.replace(_SCHEDULE_FIELDS[key], default=value)
    return s

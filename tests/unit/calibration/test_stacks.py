"""Models that hand more from layer to layer than hidden states, have two stacks, or a layer for the
next token: the replay against ordinary forwards, without a difference in float32."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from quantcli.calibration.flow import Flow
from quantcli.calibration.replay.calls import Outline
from quantcli.calibration.replay.taps import Matrices, Matrix, Tap
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.core.errors import InputError
from quantcli.planning.reach import beyond_text, next_token_layer
from tests.replaying import Replayed, make_batches, one_thread
from tests.tiny_models import COMMON, LATENT, MOE, SLIDING, save

_TWO = {
    "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "num_decoder_layers": 3, "decoder_start_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_BART = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "pad_token_id": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "decoder_start_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
# class of transformers, class of its config, the config, layers
MODELS = {
    # a second output of layers: the choice of the sparse indexer, which the next layer takes over
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", COMMON | LATENT | {
        "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "num_hidden_layers": 4,
        "indexer_types": ["full", "shared", "full", "shared"]}, 4),
    # a table of keys and values that later layers read
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", COMMON | SLIDING | {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128, "global_head_dim": 16}, 4),
    "t5": ("T5ForConditionalGeneration", "T5Config", _TWO, 5),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", _TWO, 5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART, 5),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", _BART, 5),
    "bert": ("BertForMaskedLM", "BertConfig", COMMON, 3),
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", COMMON | {
        "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}, 3),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", COMMON | {
        "cls_token_id": 0, "sep_token_id": 1, "local_attention": 8}, 3),
    "classifier": ("LlamaForSequenceClassification", "LlamaConfig", COMMON | {"num_labels": 3}, 3),
}  # fmt: skip


def make(folder, name):
    import transformers

    model_class, config_class, table, _ = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**table))
    save(folder, model, torch.float32, 0)
    return folder


def ordinary(run, path, batches):
    """What the model's own forward gives."""
    with one_thread(), torch.no_grad():
        model = type(run.skeleton.model).from_pretrained(str(path), dtype=torch.float32).eval()
        outputs = []
        for batch in batches:
            mask = None if batch.mask is None else batch.mask.long()
            inputs = {"input_ids": batch.input_ids, "attention_mask": mask}
            if model.config.is_encoder_decoder:
                start = torch.full((len(batch.input_ids), 1), model.config.decoder_start_token_id)
                inputs["decoder_input_ids"] = torch.cat([start, batch.input_ids[:, :-1]], 1)
                inputs["decoder_attention_mask"] = mask
            outputs.append(model(**inputs).logits)
        return outputs


@pytest.mark.parametrize("name", MODELS)
def test_no_difference(tmp_path, name):
    path, batches = make(tmp_path / "m", name), make_batches()
    run = Replayed(path, batches, dtype="F32")
    assert len(run.skeleton.layers) == MODELS[name][3]
    run.layers()
    for ours, theirs in zip(run.logits(), ordinary(run, path, batches), strict=True):
        assert theirs.std() > 0.01
        assert torch.equal(ours, theirs)
    assert all(p.device.type == "meta" for p in run.skeleton.model.parameters())


def test_what_is_carried_lives_as_long_as_layers_need_it(tmp_path):
    """Of Gemma 4: keys and values of the layers 0 and 1, one of each type, up to the last layer."""
    run = Replayed(make(tmp_path / "m", "gemma4"), make_batches(), dtype="F32")
    names = []
    for index in range(4):
        run.layer(index)
        names.append(sorted(run.states.carries[0]))
    first = "table.0.str.sliding_attention"
    both = sorted([first, "table.0.str.full_attention"])
    assert names == [[first], both, both, []]
    run = Replayed(make(tmp_path / "g", "glm_moe_dsa"), make_batches(), dtype="F32")
    names = []
    for index in range(4):
        run.layer(index)
        names.append(sorted(run.states.carries[0]))
    assert [bool(n) for n in names] == [True, True, True, False]


def test_groups_of_rows_with_inputs_of_their_own():
    """As the output projection of DeepSeek V4: a matrix of rows in groups, each with its own inputs."""
    layer = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    layer.weight = torch.nn.Parameter(torch.randn(6, 4, generator=generator), requires_grad=False)
    x = torch.randn(3, 5, 4, generator=generator)
    seen = []

    class Twice:
        def linear(self, matrix, rows, bias):
            seen.append((matrix, rows))
            return 2 * rows @ layer.weight.T

    matrices = Matrices("l", layer)
    with Tap(matrices, Twice()):
        y = torch.bmm(x, layer.weight.view(3, 2, 4).transpose(1, 2))
    assert seen[0][0] == Matrix("l.weight")
    assert torch.equal(seen[0][1], x.reshape(15, 4))
    expected = torch.stack([2 * x[g] @ layer.weight[2 * g : 2 * g + 2].T for g in range(3)])
    assert torch.allclose(y, expected, atol=1e-6)
    flow = Flow(matrices, None, 5)
    with flow:
        torch.bmm(x, layer.weight.view(3, 2, 4).transpose(1, 2))
    assert not flow.rows


def test_layers_that_run_twice_are_refused():
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])

    def forward(times):
        x = torch.randn(2, 3, 4)
        for _ in range(times):
            for layer in layers:
                x = layer(x)

    assert Outline(list(layers)).note(lambda: forward(1)) is not None
    assert Outline(list(layers)).note(lambda: forward(2)) is None


def test_a_failing_forward_is_an_input_error(tmp_path):
    path = make(tmp_path / "m", "bert")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"num_attention_heads": 4, "type_vocab_size": 2})
    )
    tensors = load_file(path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file(tensors | {name: torch.zeros(64, 95)}, path / "model.safetensors")
    run = Replayed(path, make_batches(), dtype="F32")
    with pytest.raises(InputError, match=r"`bert\.encoder\.layer\.1` fails on text: RuntimeError: "):
        run.layers()


# -- next-token layers ---------------------------------------------------------------------------------

_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "shared_expert_intermediate_size": 40, "num_hidden_layers": 4,
}  # fmt: skip
NEXT = {
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", COMMON | LATENT),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", COMMON | {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", COMMON | MOE | _LINEAR),
}  # fmt: skip
PARTS = {
    "mtp": ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc"),
    "layers": ("model.layers.3.enorm", "model.layers.3.hnorm", "model.layers.3.eh_proj"),
}


def make_with_next_token(folder, name):
    """A model with one layer more, whose tensors get the names of a next-token layer."""
    import transformers

    model_class, config_class, table = NEXT[name]
    layers = table["num_hidden_layers"]
    kinds = {"layer_types": [*["linear_attention"] * 3, *["full_attention"] * 2]}
    more = table | {"num_hidden_layers": layers + 1} | (kinds if name == "qwen3_next" else {})
    whole = getattr(transformers, model_class)(getattr(transformers, config_class)(**more))
    save(folder, whole, torch.float32, 0)
    tensors = load_file(folder / "model.safetensors")
    parts = PARTS["mtp" if name == "qwen3_next" else "layers"]
    generator = torch.Generator().manual_seed(1)
    for part in parts[:2]:
        tensors[f"{part}.weight"] = 1 + 0.3 * torch.randn(64, generator=generator)
    tensors[f"{parts[2]}.weight"] = 0.1 * torch.randn(64, 128, generator=generator)
    if name == "qwen3_next":
        tensors = {k.replace("model.layers.4.", "mtp.layers.0."): v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = layers
    for key in ("layer_types", "mlp_layer_types"):
        if key in config:
            config[key] = config[key][:layers]
    (folder / "config.json").write_text(json.dumps(config))
    return whole.eval(), tensors, parts


@pytest.mark.parametrize("name", NEXT)
def test_next_token_layers_follow_the_model(tmp_path, name):
    path, batches = tmp_path / "m", make_batches(padded=False)
    whole, tensors, parts = make_with_next_token(path, name)
    run = Replayed(path, batches, dtype="F32", next_token=True)
    layers = NEXT[name][2]["num_hidden_layers"]
    assert [len(stack) for stack in run.skeleton.stacks] == [layers, 1]
    run.layers()
    last = whole.model.layers[layers]
    with one_thread(), torch.no_grad():
        for number, batch in enumerate(batches):
            whole.model.layers = torch.nn.ModuleList([*whole.model.layers[:layers], last])
            kept = {}

            def before(module, args, kwargs, kept=kept):
                kept["hidden"], kept["rest"] = args[0] if args else kwargs.pop("hidden_states"), kwargs

            hook = last.register_forward_pre_hook(before, with_kwargs=True)
            whole.model(input_ids=batch.input_ids[:, :-1], use_cache=False)
            hook.remove()
            x = whole.model.embed_tokens(batch.input_ids[:, 1:])
            if name != "qwen3_next":
                x[:, 0] = 0
            h = whole.model.norm(kept["hidden"])
            one = name == "qwen3_next"  # its norms multiply by 1 + weight
            eps = whole.config.rms_norm_eps
            x, h = (
                F.rms_norm(value, (64,), one + tensors[f"{part}.weight"], eps)
                for value, part in zip((x, h), parts, strict=False)
            )
            into = torch.cat([x, h], -1) @ tensors[f"{parts[2]}.weight"].T
            expected = last(into, **kept["rest"])
            ours = run.states[number]
            assert ours.shape == expected.shape == (*batch.input_ids[:, 1:].shape, 64)
            assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_main_model_is_not_changed_by_the_layer_that_follows(tmp_path):
    path, batches = tmp_path / "m", make_batches()
    make_with_next_token(path, "deepseek_v3")
    plain, more = (Replayed(path, batches, dtype="F32", next_token=n) for n in (False, True))
    plain.layers()
    for index in range(3):
        more.layer(index)
    assert all(torch.equal(plain.states[n], more.states[n]) for n in range(len(batches)))


def test_modules_that_no_text_reaches_are_known_by_name(tmp_path):
    path = tmp_path / "m"
    make_with_next_token(path, "deepseek_v3")
    checkpoint = open_checkpoint(path)
    inside = "model.layers.3.self_attn.o_proj"
    modules = ["model.layers.2.self_attn.o_proj", inside, "model.layers.3.eh_proj"]
    head = "model.layers.3.shared_head.head"
    assert next_token_layer(checkpoint).prefix == "model.layers.3."
    roles = dict.fromkeys([*modules[1:], head], "mtp") | {modules[0]: "attention"}
    assert beyond_text(checkpoint, roles) == [head]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    other = open_checkpoint(path)
    assert next_token_layer(other) is None
    assert beyond_text(other, roles) == [*modules[1:], head]

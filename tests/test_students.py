"""Students: their sizes and weights against the teacher's, what training leaves alone, and their parameter counts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from tiny_text import tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from minilm import MiniLMLoss
from minilm.models.capture import attention_qkv
from minilm.models.heads import has_vocabulary_head
from minilm.models.students import build_student, count_parameters, freeze_unused
from minilm.objectives.outputs import SoftLabels
from minilm.objectives.relations import Relations
from minilm.objectives.term import Objective, Unit

FAMILIES = ["bert", "roberta", "distilbert", "electra", "albert", "modernbert", "llama", "qwen3", "gpt2", "t5", "vit"]
LAYERED = [family for family in FAMILIES if family != "albert"]  # whose layers share their weights
LAYER_PATH = {
    "bert": "encoder.layer",
    "distilbert": "transformer.layer",
    "llama": "layers",
    "qwen3": "layers",
    "gpt2": "h",
}


def tiny_teacher(family: str, **config: Any) -> PreTrainedModel:
    return tiny_model(family, "EncoderModel" if family == "t5" else "Model", **config)


def runs(student: PreTrainedModel) -> Tensor:
    output: Tensor = student.eval()(**tiny_inputs(student))[0]
    assert output.isfinite().all()
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_student_runs_saves_and_loads(family: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(family, attn_implementation="eager")
    before = copy.deepcopy(teacher.config.to_dict())
    student = build_student(teacher, num_layers=2, hidden_size=24)
    assert type(student) is type(teacher)
    assert runs(student).shape[-1] == 24
    assert all(q.shape[1] == 4 for q in attention_qkv(student, tiny_inputs(student))[:1])  # heads stay the teacher's
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    # The teacher is as it was, and shares nothing.
    assert teacher.config.to_dict() == before
    assert teacher.config._attn_implementation == "eager"
    student.save_pretrained(tmp_path)
    load = AutoModel if family != "t5" else type(teacher)  # T5's base for AutoModel has a decoder
    loaded, info = load.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(runs(loaded), runs(student))


def test_sizes_left_out() -> None:
    bert = build_student(tiny_model("bert"), hidden_size=24).config
    assert (bert.num_hidden_layers, bert.hidden_size) == (4, 24)
    assert (bert.num_attention_heads, bert.intermediate_size) == (4, 96)
    gated = build_student(tiny_model("modernbert"), hidden_size=16).config  # 48 / 32 in the teacher
    assert gated.intermediate_size == 24
    distilbert = build_student(tiny_model("distilbert"), num_layers=1, hidden_size=24, num_heads=2).config
    assert (distilbert.n_layers, distilbert.dim, distilbert.n_heads, distilbert.hidden_dim) == (1, 24, 2, 96)
    gpt2 = build_student(tiny_model("gpt2"), num_layers=1, hidden_size=24, intermediate_size=40).config
    assert (gpt2.n_layer, gpt2.n_embd, gpt2.n_head, gpt2.n_inner) == (1, 24, 4, 40)
    llama = build_student(tiny_model("llama"), hidden_size=24, num_heads=2).config
    assert (llama.head_dim, llama.num_key_value_heads) == (12, 2)
    qwen3 = build_student(tiny_model("qwen3"), hidden_size=24).config  # its head_dim stands apart from the width
    assert (qwen3.head_dim, qwen3.num_key_value_heads) == (16, 2)
    assert build_student(tiny_model("qwen3"), num_heads=3).config.num_key_value_heads == 1
    assert build_student(tiny_model("electra"), hidden_size=24).config.embedding_size == 16
    assert build_student(tiny_model("vit"), hidden_size=24).config.pooler_output_size == 24


def test_kind_of_attention_follows_the_teachers_layers() -> None:
    teacher = tiny_model("modernbert")
    assert teacher.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    for init in ("random", "layers"):
        student = build_student(teacher, num_layers=2, init=init)
        assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert build_student(teacher, num_layers=5).config.layer_types == [*teacher.config.layer_types, "full_attention"]


def test_layers_without_rotary_positions_follow_the_teachers() -> None:
    assert tiny_model("smollm3").config.no_rope_layers == [1, 1, 1, 0]
    assert build_student(tiny_model("smollm3"), num_layers=2).config.no_rope_layers == [1, 0]


@pytest.mark.parametrize(
    ("family", "path", "kept"),
    [("bert", "encoder.layer", [1, 3]), ("modernbert", "layers", [0, 2]), ("modernbert", "layers", [0, 3])],
)
def test_layers_kept_in_place_are_what_a_student_gets(family: str, path: str, kept: list[int]) -> None:
    """As in sentence-transformers' recipe; ModernBERT's layers keep their kind of attention."""
    teacher = tiny_model(family)
    parent, _, name = path.rpartition(".")
    layers = nn.ModuleList([teacher.get_submodule(f"{path}.{index}") for index in kept])
    setattr(teacher.get_submodule(parent), name, layers)
    teacher.config.num_hidden_layers = 2
    student = build_student(teacher, init="layers")
    inputs = {"input_ids": torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(**inputs)[0], teacher(**inputs)[0])


def assert_starts_from(student: PreTrainedModel, teacher: PreTrainedModel, path: str, layers: list[int]) -> None:
    """Every parameter equals the teacher's, of these layers, and lives in memory of its own."""
    given = dict(teacher.named_parameters())
    lists = dict(teacher.named_modules())[path]
    for index, layer in enumerate(layers):
        for name, parameter in lists[layer - 1].named_parameters():  # type: ignore[index]
            given[f"{path}.{index}.{name}"] = parameter
    memory = {parameter.data_ptr() for parameter in teacher.parameters()}
    names = [name for name, _ in student.named_parameters()]
    assert len(names) > 10
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, given[name]), name
        assert parameter.data_ptr() not in memory


@pytest.mark.parametrize("family", LAYER_PATH)
@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({"num_layers": 2}, [2, 4]),
        ({"num_layers": 3}, [1, 2, 4]),
        ({"num_layers": 1, "init": "layers"}, [4]),
        ({"init": "layers", "teacher_layers": [3, -4]}, [3, 1]),
        ({"init": "slice", "num_layers": 2}, [2, 4]),  # nothing to cut
        ({}, [1, 2, 3, 4]),
    ],
)
def test_start_from_layers(family: str, arguments: dict[str, Any], layers: list[int]) -> None:
    teacher = tiny_model(family)
    assert_starts_from(build_student(teacher, **arguments), teacher, LAYER_PATH[family], layers)


@pytest.mark.parametrize("family", LAYERED)
def test_whole_copy_computes_what_the_teacher_computes(family: str) -> None:
    teacher = tiny_teacher(family)
    student = build_student(teacher, init="layers")
    assert torch.equal(runs(student), runs(teacher))


def test_layers_of_t5_keep_the_position_bias_of_the_first() -> None:
    teacher = tiny_teacher("t5")
    student = build_student(teacher, num_layers=2, init="layers")
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(student.get_parameter(name), teacher.get_parameter(name))


def test_auto_falls_to_random_where_sizes_differ() -> None:
    teacher = tiny_model("bert")
    embedding = "embeddings.word_embeddings.weight"
    for sizes in ({"num_layers": 5}, {"num_heads": 2}, {"intermediate_size": 64}, {"hidden_size": 24}):
        student = build_student(teacher, **sizes)
        mine, theirs = student.get_parameter(embedding), teacher.get_parameter(embedding)
        assert not torch.equal(mine[:, :24], theirs[:, :24])
        assert 0.01 < mine.std() < 0.03  # BERT's own initialisation; the tiny teacher has 0.2
    student = build_student(teacher, num_layers=2, init="random")
    assert 0.01 < student.get_parameter(embedding).std() < 0.03


def test_slice_takes_first_rows_and_columns() -> None:
    teacher = tiny_model("bert", "ForMaskedLM")
    student = build_student(teacher, num_layers=2, hidden_size=16, init="slice")
    assert type(student) is type(teacher.base_model)
    given = dict(teacher.base_model.named_parameters())
    sliced = {
        "embeddings.word_embeddings.weight": given["embeddings.word_embeddings.weight"][:, :16],
        "embeddings.LayerNorm.bias": given["embeddings.LayerNorm.bias"][:16],
        "encoder.layer.0.attention.self.key.weight": given["encoder.layer.1.attention.self.key.weight"][:16, :16],
        "encoder.layer.1.intermediate.dense.weight": given["encoder.layer.3.intermediate.dense.weight"][:64, :16],
        "encoder.layer.1.output.dense.weight": given["encoder.layer.3.output.dense.weight"][:16, :64],
    }
    for name, expected in sliced.items():
        assert torch.equal(student.get_parameter(name), expected), name
    assert student.pooler is not None  # the masked-LM teacher has none: the class's own
    assert 0.01 < student.get_parameter("pooler.dense.weight").std() < 0.03


@pytest.mark.parametrize(
    ("family", "name", "axis"), [("modernbert", "layers.0.attn.Wqkv.weight", 0), ("gpt2", "h.0.attn.c_attn.weight", 1)]
)
def test_slice_of_stacked_projections_cuts_each_part(family: str, name: str, axis: int) -> None:
    teacher = tiny_model(family)
    student = build_student(teacher, num_layers=2, hidden_size=16, init="slice")
    stacked = teacher.get_parameter(name.replace(".0.", ".1.")).narrow(1 - axis, 0, 16)
    for mine, theirs in zip(student.get_parameter(name).chunk(3, axis), stacked.chunk(3, axis), strict=True):
        assert torch.equal(mine, theirs.narrow(axis, 0, 16))


@pytest.mark.parametrize("family", FAMILIES)
def test_slice_of_every_family_runs(family: str) -> None:
    teacher = tiny_teacher(family)
    student = build_student(teacher, num_layers=2, hidden_size=16, init="slice")
    runs(student)
    for name, parameter in student.named_parameters():
        if parameter.ndim > 1:
            assert 0.1 < parameter.std() < 0.3, name  # the tiny teacher's 0.2; initialised ones have 0.02


def test_slice_across_grouped_heads_and_gate_up() -> None:
    teacher = tiny_model("qwen3")
    student = build_student(teacher, hidden_size=16, num_heads=2, intermediate_size=20, num_layers=4, init="slice")
    mine = student.get_parameter("layers.0.self_attn.q_proj.weight")
    assert mine.shape == (2 * 16, 16)
    assert torch.equal(mine, teacher.get_parameter("layers.0.self_attn.q_proj.weight")[:32, :16])
    runs(student)


def test_slice_and_layers_of_a_vision_teacher() -> None:
    teacher = tiny_model("vit")
    cut = build_student(teacher, num_layers=2, hidden_size=16, init="slice")
    whole = build_student(teacher, num_layers=2, init="layers")
    for name, axis in (("projection.weight", 0), ("projection.bias", 0)):
        patches = f"embeddings.patch_embeddings.{name}"
        assert torch.equal(cut.get_parameter(patches), teacher.get_parameter(patches).narrow(axis, 0, 16))
        assert torch.equal(whole.get_parameter(patches), teacher.get_parameter(patches))
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        assert torch.equal(cut.get_parameter(name), teacher.get_parameter(name)[..., :16])
    layer = "layers.{}.mlp.fc1.weight" if hasattr(teacher, "layers") else "encoder.layer.{}.intermediate.dense.weight"
    assert torch.equal(cut.get_parameter(layer.format(0)), teacher.get_parameter(layer.format(1))[:64, :16])
    assert torch.equal(whole.get_parameter(layer.format(1)), teacher.get_parameter(layer.format(3)))


def embedded(model: PreTrainedModel, words: slice) -> Tensor:
    """Words with their position and token type, as BERT adds them before its norm: (words, hidden_size)."""
    tables = model.get_submodule("embeddings")
    types, positions = tables.get_submodule("token_type_embeddings"), tables.get_submodule("position_embeddings")
    words_at = tables.get_submodule("word_embeddings").weight[words]
    return words_at + positions.weight[: len(words_at)] + types.weight[0]


def test_pca_keeps_inner_products_of_low_rank_embeddings() -> None:
    teacher = tiny_model("bert")
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 32, generator=generator)  # all tables in one space of 8 dimensions, within the 16 kept
    with torch.no_grad():
        for table in teacher.modules():
            if isinstance(table, nn.Embedding):
                coordinates = torch.randn(table.num_embeddings, 8, generator=generator) + 1  # a mean that is not 0
                table.weight.copy_(coordinates @ basis)
        exact = embedded(teacher, slice(5, 25))
        gram = exact @ exact.T

        def error(init: Any) -> float:
            student = build_student(teacher, num_layers=2, hidden_size=16, init=init, seed=0)
            mine = embedded(student, slice(5, 25))
            return float((mine @ mine.T - gram).norm() / gram.norm())

        assert error("pca") < 1e-5
        assert error("slice") > 0.1


def test_pca_keeps_the_components_of_largest_variance() -> None:
    """Around the mean: its own direction, which all words share, is not one of them."""
    teacher = tiny_model("bert")
    scale = torch.linspace(0.1, 3.2, 32)  # the variance grows with the coordinate
    with torch.no_grad():
        words = torch.randn(60, 32, generator=torch.Generator().manual_seed(0)) * scale
        words[:, 0] = 100.0
        teacher.get_input_embeddings().weight.copy_(words)
        student = build_student(teacher, hidden_size=16, init="pca", seed=0)
        mine = student.get_input_embeddings().weight
        centred = words - words.mean(0)
        expected = torch.linalg.svdvals(centred)[:16]
        assert torch.allclose(torch.linalg.svdvals(mine - mine.mean(0)), expected, rtol=1e-4)
        variances = (mine - mine.mean(0)).square().sum(0)
        assert torch.equal(variances, variances.sort(descending=True).values)


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "electra", "albert", "modernbert", "llama", "gpt2", "t5"]
)
def test_pca_projects_tables_alone(family: str) -> None:
    teacher = tiny_teacher(family)
    student = build_student(teacher, num_layers=5, hidden_size=24, init="pca", seed=0)
    runs(student)
    random = build_student(teacher, num_layers=5, hidden_size=24, init="random", seed=0)
    width = teacher.get_input_embeddings().embedding_dim
    modules = teacher.named_modules()
    tables = {f"{n}.weight" for n, m in modules if isinstance(m, nn.Embedding) and m.embedding_dim == width}
    initial = dict(random.named_parameters())
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, initial[name])}
    assert changed == tables & initial.keys()


@pytest.mark.parametrize("init", ["layers", "slice", "pca", "random"])
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "ForMaskedLM"),
        ("roberta", "ForMaskedLM"),
        ("distilbert", "ForMaskedLM"),
        ("electra", "ForMaskedLM"),
        ("modernbert", "ForMaskedLM"),
        ("llama", "ForCausalLM"),
        ("gpt2", "LMHeadModel"),
        ("bert", "ForSequenceClassification"),
        ("vit", "ForImageClassification"),
    ],
)
def test_student_with_the_teachers_head(family: str, head: str, init: Any) -> None:
    teacher = tiny_model(family, head, num_labels=3)
    if family == "vit" and init == "pca":
        with pytest.raises(ValueError, match="init 'pca' projects word embeddings, ViTModel has none"):
            build_student(teacher, hidden_size=16, init=init, with_head=True)
        return
    width = 32 if init == "layers" else 16
    student = build_student(teacher, num_layers=2, hidden_size=width, init=init, with_head=True, seed=0)
    assert type(student) is type(teacher)
    inputs = tiny_inputs(student)
    with torch.no_grad():
        assert student.eval()(**inputs).logits.shape == teacher(**inputs).logits.shape
    head_layer = student.get_output_embeddings()
    if head_layer is not None and family != "llama":
        assert head_layer.weight is student.get_input_embeddings().weight
    for name, parameter in student.named_parameters():
        if name.startswith(teacher.base_model_prefix + ".") or init not in ("layers", "slice"):
            continue
        given = teacher.get_parameter(name)
        assert torch.equal(parameter, given[tuple(slice(size) for size in parameter.shape)]), name
    whole = build_student(teacher, init="layers", with_head=True).eval()
    with torch.no_grad():
        assert torch.equal(whole(**inputs).logits, teacher(**inputs).logits)


def test_seed() -> None:
    teacher = tiny_model("bert")

    def weights(seed: int | None) -> Tensor:
        return build_student(teacher, hidden_size=16, seed=seed).get_parameter("encoder.layer.0.output.dense.weight")

    state = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)
    torch.manual_seed(3)
    assert torch.equal(weights(None), first)  # without a seed, the global generator's


def test_half_precision_teacher_makes_a_float32_student() -> None:
    teacher = tiny_model("bert").bfloat16()
    teacher.config.dtype = torch.bfloat16  # as from_pretrained(dtype=...) leaves it
    student = build_student(teacher, num_layers=2)
    assert student.dtype == torch.float32
    assert student.config.dtype in (None, torch.float32)
    expected = teacher.get_parameter("encoder.layer.1.output.dense.weight").float()
    assert torch.equal(student.get_parameter("encoder.layer.0.output.dense.weight"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 30}, r"hidden_size 30 is not divisible by num_heads 4"),
        ({"num_heads": 5}, r"hidden_size 32 is not divisible by num_heads 5"),
        ({"num_layers": 5, "init": "layers"}, r"init 'layers' takes 5 layers from a teacher that has 4"),
        ({"num_layers": 5, "init": "slice"}, r"init 'slice' takes 5 layers from a teacher that has 4"),
        ({"hidden_size": 16, "init": "layers"}, r"init 'layers' copies hidden_size 32, the student's is 16"),
        ({"num_heads": 2, "init": "layers"}, r"init 'layers' copies num_heads 4, the student's is 2"),
        ({"hidden_size": 64, "init": "slice"}, r"init 'slice' cannot widen hidden_size from 32 to 64"),
        ({"intermediate_size": 200, "init": "slice"}, r"init 'slice' cannot widen intermediate_size from 128 to 200"),
        ({"teacher_layers": [1, 5]}, r"layer 5 does not exist: layers are 1 to 4"),
        ({"teacher_layers": [1, 2], "num_layers": 3}, r"teacher_layers names 2 layers, num_layers is 3"),
        (
            {"teacher_layers": [1, 2], "hidden_size": 16},
            r"teacher_layers \[1, 2\] is given, but the student's layers start random",
        ),
        ({"num_layers": 0}, r"num_layers is 0: it must be at least 1"),
        ({"hidden_size": -8}, r"hidden_size is -8: it must be at least 1"),
        ({"hidden_size": 64, "init": "pca"}, r"init 'pca' cannot widen the embeddings from 32 to 64"),
        ({"with_head": True}, r"the teacher is a BertModel, which has no head for the student to have"),
        ({"init": "svd"}, r"init 'svd' is none of auto, random, layers, slice, pca"),
    ],
)
def test_wrong_students(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(tiny_model("bert"), **arguments)


def relation_loss(student: PreTrainedModel, names: str = "qkv") -> Tensor:
    qkv = dict(zip("qkv", attention_qkv(student, tiny_inputs(student)), strict=True))
    return torch.stack([qkv[name].square().sum() for name in names]).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_freeze_unused_leaves_exactly_what_gets_a_gradient(family: str) -> None:
    student = build_student(tiny_teacher(family), num_layers=2, seed=0).train()
    state = torch.get_rng_state()
    frozen = freeze_unused(student)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in student.modules())
    assert all(parameter.grad is None for parameter in student.parameters())
    relation_loss(student).backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (name not in frozen), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    if family != "albert":
        assert len(frozen) >= 2


def test_freeze_unused_of_bert_by_name() -> None:
    student = build_student(tiny_model("bert"), num_layers=2)
    last = "encoder.layer.1."
    after = {name for name, _ in student.named_parameters() if name.startswith((last, "pooler."))}
    kinds = ("weight", "bias")
    projections = {f"{last}attention.self.{name}.{kind}" for name in ("query", "key", "value") for kind in kinds}
    assert set(freeze_unused(student)) == after - projections
    assert freeze_unused(student) == []
    only_qk = build_student(tiny_model("bert"), num_layers=2)
    value = {f"{last}attention.self.value.{kind}" for kind in kinds}
    assert set(freeze_unused(only_qk, ["qk"])) == (after - projections) | value


@pytest.mark.parametrize(
    ("family", "head", "frozen"),
    [
        ("bert", "ForMaskedLM", []),
        ("llama", "ForCausalLM", []),
        ("bert", "ForSequenceClassification", []),
        ("vit", "ForImageClassification", []),
        ("bert", "ForPreTraining", ["bert.pooler.dense", "cls.seq_relationship"]),
    ],
)
def test_freeze_unused_with_the_output_loss(family: str, head: str, frozen: list[str]) -> None:
    teacher = tiny_model(family, head)
    student = build_student(teacher, num_layers=2, with_head=True)
    unit: Unit = "tokens" if has_vocabulary_head(student) else "examples"
    objective = Objective([Relations(MiniLMLoss()), SoftLabels(unit)])
    unused = objective.freeze_unused(teacher, student)
    assert unused == [f"{name}.{kind}" for name in frozen for kind in ("weight", "bias")]
    assert freeze_unused(student)  # the relations alone leave the head out


def test_a_gradient_that_is_cut_below_the_last_layer_is_an_error() -> None:
    student = build_student(tiny_model("bert"))
    student.get_submodule("encoder.layer.1").register_forward_hook(lambda _module, _inputs, output: output.detach())
    with pytest.raises(ValueError, match=r"layer 4 of BertModel reaches nothing in its layer 1 \(encoder.layer.0\)"):
        freeze_unused(student)
    frozen = build_student(tiny_model("bert"))
    frozen.get_submodule("encoder.layer.0").requires_grad_(False)  # by the user
    assert freeze_unused(frozen)


def test_a_model_that_needs_more_than_its_main_input_is_refused_in_a_sentence() -> None:
    student = build_student(tiny_model("bert"))
    student.register_forward_pre_hook(lambda *_: {}["bbox"])
    with pytest.raises(ValueError, match=r"BertModel does not run on input_ids alone \(KeyError: 'bbox'\)$"):
        freeze_unused(student)


def test_lists_that_are_no_layers_keep_their_order() -> None:
    """Two convolutions, and two layers taken from four: the convolutions stay where they are."""
    teacher = tiny_model("wav2vec2")
    student = build_student(teacher, num_layers=2, init="layers")
    for name in ("feature_extractor.conv_layers.0.conv.weight", "feature_extractor.conv_layers.1.conv.weight"):
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name))
    name = "encoder.layers.{}.attention.q_proj.weight"
    assert torch.equal(student.get_parameter(name.format(0)), teacher.get_parameter(name.format(1)))


def test_the_contact_head_of_esm_keeps_the_chosen_layers_heads() -> None:
    teacher = tiny_model("esm")
    student = build_student(teacher, num_layers=2)
    name = "contact_head.regression.weight"
    mine, theirs = student.get_parameter(name), teacher.get_parameter(name)
    assert torch.equal(mine.reshape(2, 4), theirs.reshape(4, 4)[[1, 3]])


class Distilled(nn.Module):
    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student

    def forward(self) -> Tensor:
        return relation_loss(self.student)


@pytest.mark.usefixtures("process_group")
def test_ddp_runs_without_find_unused_parameters() -> None:
    def two_steps(student: PreTrainedModel) -> None:
        ddp = nn.parallel.DistributedDataParallel(Distilled(student))
        for _ in range(2):
            ddp().backward()

    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        two_steps(build_student(tiny_model("bert"), num_layers=2))
    student = build_student(tiny_model("bert"), num_layers=2)
    freeze_unused(student)
    two_steps(student)


@pytest.mark.parametrize(
    ("layers", "width", "millions"),  # MiniLM v1 (arXiv 2002.10957) and v2 (arXiv 2012.15828), tables of students
    [(12, 768, 109), (6, 768, 66), (12, 384, 33), (6, 384, 22), (4, 384, 19), (3, 384, 17)],
)
def test_parameters_as_the_papers_count_them(layers: int, width: int, millions: int) -> None:
    with torch.device("meta"):
        teacher = AutoModel.from_config(BertConfig())
    student = teacher
    if (layers, width) != (12, 768):
        student = build_student(teacher, num_layers=layers, hidden_size=width, init="random")
    counted = count_parameters(student)
    assert abs(counted["total"] / 1e6 - millions) < 1
    assert counted["total"] == counted["embedding"] + counted["transformer"]
    pooler = width * width + width
    assert counted["total"] == sum(parameter.numel() for parameter in student.parameters()) - pooler
    assert counted["transformer"] == layers * (12 * width * width + 13 * width)


def test_parameters_leave_heads_out() -> None:
    for family, head in (("bert", "ForMaskedLM"), ("llama", "ForCausalLM")):
        model = tiny_model(family, head)
        assert count_parameters(model) == count_parameters(model.base_model)
        assert count_parameters(model)["embedding"] >= 60 * 32


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_saved_student_loads_elsewhere(head: str, tmp_path: Path) -> None:
    teacher = tiny_model("bert", head)
    student = build_student(teacher, num_layers=2, hidden_size=16, with_head=head != "Model").eval()
    student.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    inputs = tiny_inputs(student)

    def base_output(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            output: Tensor = model.eval().base_model(**inputs).last_hidden_state
        return output

    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base_output(base), base_output(student))
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert {"classifier.weight", "classifier.bias"} <= set(info["missing_keys"])
    assert torch.equal(base_output(classifier), base_output(student))
    assert classifier(**inputs).logits.shape == (2, 3)


def test_saved_student_makes_sentence_vectors(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    student = build_student(tiny_model("bert"), num_layers=2, hidden_size=16, seed=0).eval()
    student.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    texts = ["a short one", "and another which is longer"]
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    vectors = torch.from_numpy(model.encode(texts))
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        hidden = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    assert vectors.shape == (2, 16)
    assert torch.allclose(vectors, (hidden * mask).sum(1) / mask.sum(1), atol=1e-5)

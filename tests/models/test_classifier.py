"""Classifiers: they learn, they ignore what is unknown, and they come back from disk."""

import json
import math
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch

from prism_lib.evaluation import metrics
from prism_lib.models import classifier
from prism_lib.models.classifier import ClassifierConfig

SMALL = ClassifierConfig(
    labels=("Bright", "Square"), blocks=(2, 2), growth=4, features=8, epochs=10, batch_size=8, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def data():
    """Brightness, and a square or none: both plain to see."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (96, 2), generator=generator).float()
    images = 0.2 + 0.1 * torch.rand(96, 1, 32, 32, generator=generator) + 0.4 * labels[:, :1, None, None]
    images[:, :, 10:22, 10:22] += 0.3 * labels[:, 1:, None, None]
    return images.clamp(0, 1), labels


def predict(network, images):
    return classifier.Classifier(network, SMALL.labels).read(images)


@pytest.fixture(scope="module")
def trained(data):
    return classifier.train_classifier(*data, SMALL)


def test_it_learns_what_is_plain_to_see(trained, data):
    read = torch.stack([predict(trained, data[0]), data[1]], 1)
    assert min(metrics.auc(read[..., label]) for label in range(2)) > 0.9


def test_training_is_deterministic(trained, data):
    again = classifier.train_classifier(*data, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_unknown_labels_do_not_count(data):
    images, labels = data
    parameters = {}
    for unknown in (float("nan"), -1.0, 0.0):
        given = labels.clone()
        given[48:, 0] = unknown
        model = classifier.train_classifier(images, given, SMALL)
        parameters[str(unknown)] = torch.cat([p.flatten() for p in model.parameters()])
    assert torch.equal(parameters["nan"], parameters["-1.0"]), "uncertain and missing are both unknown"
    assert not torch.equal(parameters["nan"], parameters["0.0"]), "and unknown is not absent"


def test_bytes_and_floats_are_the_same_image(trained, data):
    coded = (data[0][:4] * 255).round().byte()
    assert torch.allclose(predict(trained, coded), predict(trained, coded.float() / 255))


def test_it_comes_back_from_disk(trained, data, tmp_path):
    folder = classifier.save_classifier(trained, SMALL, tmp_path / "judge")
    loaded, config = classifier.load_classifier(folder)
    assert config == SMALL
    expected = predict(trained, data[0])
    torch.testing.assert_close(predict(loaded, data[0]), expected, atol=0.02, rtol=0)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        classifier.load_classifier(tmp_path / "nowhere")


def test_larger_images_are_reduced_before_they_are_read(data, tmp_path):
    """In training and in prediction, also of a classifier that comes from disk, and for who calls the network."""
    images, labels = data
    large = torch.nn.functional.interpolate(images, scale_factor=2)
    config = replace(SMALL, size=16, steps=3)
    model = classifier.train_classifier(large, labels, config)
    expected = torch.nn.functional.interpolate(large, (16, 16), mode="bilinear", antialias=True)
    read = predict(model, large)
    assert torch.allclose(read, predict(model, expected), atol=1e-5)
    assert torch.equal(read, model(large).sigmoid())
    whole = classifier.build_classifier(replace(config, size=0)).eval()
    whole.load_state_dict(model.state_dict())
    assert not torch.allclose(read, predict(whole, large), atol=1e-3)
    loaded, _ = classifier.load_classifier(classifier.save_classifier(model, config, tmp_path / "small"))
    torch.testing.assert_close(predict(loaded, large), read, atol=0.02, rtol=0)
    small = replace(config, size=100)
    untouched = classifier.train_classifier(images, labels, small)
    same = classifier.train_classifier(images, labels, replace(config, size=0))
    assert all(torch.equal(a, b) for a, b in zip(untouched.parameters(), same.parameters(), strict=True))


def test_a_classifier_of_an_older_version_loads(trained, tmp_path):
    folder = classifier.save_classifier(trained, SMALL, tmp_path / "old")
    older = json.loads((folder / "config.json").read_text())
    del older["size"]
    (folder / "config.json").write_text(json.dumps(older))
    assert classifier.load_classifier(folder)[1] == SMALL


def test_bad_labels_are_named(data):
    images, labels = data
    with pytest.raises(ValueError, match="'Square' has one class"):
        classifier.train_classifier(images, torch.stack([labels[:, 0], torch.ones(96)], 1), SMALL)
    with pytest.raises(ValueError, match="96 images"):
        classifier.train_classifier(images, labels[:10], SMALL)


def test_steps_are_counted_whatever_the_size_of_the_set(data, monkeypatch):
    seen = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args, **kw: (seen.append(1), real(self, *args, **kw)))
    for count in (16, 96):
        classifier.train_classifier(data[0][:count], data[1][:count], replace(SMALL, steps=7))
    assert len(seen) == 14


def test_groups_are_drawn_equally_often():
    groups = torch.tensor([5] * 90 + [2] * 10)
    config = replace(SMALL, objective="reweighted", batch_size=10)
    drawn = torch.cat(list(islice(classifier._batches(100, config, groups, torch.Generator().manual_seed(0)), 200)))
    assert (groups[drawn] == 2).float().mean().item() == pytest.approx(0.5, abs=0.03)
    plain = torch.cat(list(islice(classifier._batches(100, SMALL, groups, torch.Generator().manual_seed(0)), 10)))
    assert len(plain.unique()) == len(plain) == 80, "an epoch shows an image once"


def test_group_dro_moves_its_weight_to_the_worst_group():
    worst = classifier._WorstGroup(torch.tensor([0, 0, 1, 1]), step=0.5)
    losses = torch.tensor([0.0, 0.0, 2.0, 4.0])
    objective = worst(losses, torch.arange(4))
    # group losses 0 and 3: q = (1, e^1.5) / (1 + e^1.5)
    share = math.exp(1.5) / (1 + math.exp(1.5))
    assert worst.q.tolist() == pytest.approx([1 - share, share])
    assert objective.item() == pytest.approx(3 * share)


def test_an_objective_of_groups_needs_groups(data):
    for objective in ("reweighted", "group_dro"):
        with pytest.raises(ValueError, match="needs the group of each of the 96 images"):
            classifier.train_classifier(*data, replace(SMALL, objective=objective))
        model = classifier.train_classifier(
            *data, replace(SMALL, objective=objective, steps=3), groups=data[1][:, 0].long()
        )
        assert torch.isfinite(predict(model, data[0][:4])).all()
    with pytest.raises(ValueError, match=r"(?s)objective.*'sgd'"):
        replace(SMALL, objective="sgd")


@pytest.mark.parametrize("name", ["efficientnet-b0", "resnet18"])
def test_a_second_architecture_trains_and_comes_back(data, tmp_path, name):
    config = classifier.named_network(name, replace(SMALL, steps=2))
    model = classifier.train_classifier(*data, config)
    loaded, back = classifier.load_classifier(classifier.save_classifier(model, config, tmp_path / "second"))
    assert back == config and back.network == name
    torch.testing.assert_close(predict(loaded, data[0][:4]), predict(model, data[0][:4]), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="unknown network 'resnet'"):
        classifier.named_network("resnet", SMALL)


def test_densenet_121_is_densenet_121():
    model = classifier.build_classifier(classifier.named_network("densenet121", ClassifierConfig()))
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 121


# --- classifiers of others: the contract and its guards --------------------------------------------

XRV = (
    *("Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema", "Fibrosis", "Effusion"),
    *("Pneumonia", "Pleural_Thickening", "Cardiomegaly", "Nodule", "Mass", "Hernia", "Lung Lesion", "Fracture"),
    *("Lung Opacity", "Enlarged Cardiomediastinum"),
)


class LikeXRV(torch.nn.Module):
    """TorchXRayVision's interface: [-1024, 1024], 224 pixels, 18 `pathologies`, "" and 0.5 (or NaN) for untrained."""

    def __init__(self, weights="all", blank="", untrained=0.5):
        super().__init__()
        self.pathologies = [blank if weights == "rsna" and name == "Hernia" else name for name in XRV]
        self.untrained, self.weights = untrained, weights
        self.scale = torch.nn.Parameter(torch.tensor(4.0))
        self.eval()

    def forward(self, images):
        assert images.shape[1:] == (1, 224, 224) and images.min() < -1, "gray, 224 pixels, beyond [0, 1]"
        logit = self.scale * images.mean((1, 2, 3)) / 1024
        outputs = torch.stack([(logit + 0.1 * k).sigmoid() for k in range(18)], 1)
        if self.weights == "rsna":
            outputs[:, XRV.index("Hernia")] = self.untrained
        return outputs


class Small(torch.nn.Module):
    """Two logits of a gray image of any size."""

    labels = ("Bright", "Dark")

    def __init__(self, scale=10.0, channels=1):
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, 2, 1, bias=False)
        torch.nn.init.constant_(self.layer.weight, scale)

    def forward(self, images):
        return self.layer(images).mean((2, 3)) * torch.tensor([1.0, -1.0])


def small(**settings):
    return Small(**settings).eval()


def forgetful():
    return Small()


def contract():
    return classifier.Classifier(small(), ("A", "B"), size=8)


def a_list():
    return ["A"]


def breaks():
    raise RuntimeError("no weights")


def no_labels():
    return torch.nn.Identity().eval()


HERE = "tests.models.test_classifier"
IMAGES = torch.linspace(0.1, 0.9, 4)[:, None, None, None].expand(-1, 1, 32, 32)


def test_torchxrayvision_is_named_with_its_range_and_size(caplog):
    how = {"size": 224, "value_range": (-1024, 1024), "outputs": "probabilities"}
    loaded = classifier.Classifier.load(
        f"{HERE}:LikeXRV", arguments={"weights": "rsna"}, rename={"Effusion": "Pleural Effusion"}, **how
    )
    assert f"{HERE}:LikeXRV runs code of the module {HERE}" in caplog.text
    assert len(loaded.labels) == 17 and "Pleural Effusion" in loaded.labels and "Hernia" not in loaded.labels
    good = loaded.checked(IMAGES, ["Pleural Effusion", "Support Devices"])
    read = good.only(["Cardiomegaly"]).read(IMAGES)[:, 0]
    expected = (4 * (2 * IMAGES[:, 0, 0, 0] - 1) + 0.1 * XRV.index("Cardiomegaly")).sigmoid()
    torch.testing.assert_close(read, expected)
    torch.testing.assert_close(good.only(["Cardiomegaly"]).logits(IMAGES)[:, 0].sigmoid(), expected)
    colour = IMAGES.expand(-1, 3, -1, -1)
    torch.testing.assert_close(good.read(colour), good.read(IMAGES)), "read in gray"
    # NaN for an untrained label: it is left out, and said.
    caplog.clear()
    nan = {"weights": "rsna", "blank": "Hernia", "untrained": math.nan}
    loaded = classifier.Classifier.load(f"{HERE}:LikeXRV", arguments=nan, **how)
    assert "Hernia" in loaded.labels
    with pytest.raises(ValueError, match="LikeXRV gives NaN for 'Hernia'"):
        loaded.read(IMAGES)
    assert len(loaded.checked(IMAGES).labels) == 17
    assert "gives NaN for Hernia, for which it was not trained" in caplog.text


def test_features_are_what_the_last_linear_layer_reads():
    linear = torch.nn.Linear(4, 2)
    net = classifier.Classifier(torch.nn.Sequential(torch.nn.Flatten(), linear).eval(), ("a", "b"), batch_size=2)
    images = torch.rand(3, 1, 2, 2)
    features = net.features(images)
    assert torch.equal(features, images.flatten(1))
    assert torch.allclose(linear(features), net.logits(images))
    with pytest.raises(ValueError, match="no linear layer"):
        classifier.Classifier(torch.nn.Flatten().eval(), ("a",)).features(images)
    unused = torch.nn.Flatten()
    unused.head = torch.nn.Linear(4, 2)
    for wrong, given in ((unused, images), (net.network, images * torch.nan)):
        labels = tuple("abcd") if wrong is unused else ("a", "b")
        with pytest.raises(ValueError, match="mine: its last linear layer does not read one finite row"):
            classifier.Classifier(wrong.eval(), labels, name="mine").features(given)


def test_a_factory_may_give_the_whole_contract():
    loaded = classifier.Classifier.load(f"{HERE}:contract", name="mine")
    assert (loaded.labels, loaded.size, loaded.name) == (("A", "B"), 8, "mine")
    loaded = classifier.Classifier.load(f"{HERE}:small", arguments={"scale": 2.0}, labels=["A", "B"])
    torch.testing.assert_close(loaded.logits(IMAGES)[:, 0], 2 * IMAGES[:, 0, 0, 0])
    assert classifier.Classifier.load(f"{HERE}:small").labels == ("Bright", "Dark")


def test_ours_reads_to_the_bit_what_its_network_gives(trained, data, tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_WEIGHTS", str(tmp_path))
    classifier.save_classifier(trained, SMALL, tmp_path / "mine")
    loaded = classifier.Classifier.load("mine").checked(data[0], ["Bright"])
    network, _ = classifier.load_classifier(tmp_path / "mine")
    with torch.no_grad():
        given = torch.cat([network(part).sigmoid() for part in data[0].split(16)])
    assert torch.equal(loaded.read(data[0]), given)
    assert torch.equal(loaded.only(["Square"]).read(data[0]), given[:, 1:])
    assert torch.equal(loaded.logits(data[0]).sigmoid() >= 0.5, loaded.read(data[0]) >= 0.5)


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        (
            "nowhere.at_all:make",
            {},
            "nowhere.at_all:make failed: ModuleNotFoundError: No module named 'nowhere'",
        ),
        (f"{HERE}:nothing", {}, "failed: AttributeError"),
        (f"{HERE}:breaks", {}, "failed: RuntimeError: no weights"),
        (f"{HERE}:small", {"arguments": {"depth": 3}}, "failed: TypeError.*depth"),
        (f"{HERE}:a_list", {}, "returned list, not a torch.nn.Module or Classifier"),
        (f"{HERE}:forgetful", {}, "is in training mode, so an output depends on the batch"),
        (f"{HERE}:no_labels", {}, "does not name its outputs: give its labels"),
        (f"{HERE}:small", {"rename": {"Gray": "B"}}, "has no label 'Gray' to rename; it has Bright, Dark"),
        (f"{HERE}:small", {"rename": {"Dark": "Bright"}}, "has two outputs for the label 'Bright'"),
        (f"{HERE}:small", {"channels": 2}, "channels"),
        (f"{HERE}:small", {"colour": 2}, "colour"),
    ],
)
def test_a_source_that_gives_no_classifier_is_refused(source, settings, said):
    with pytest.raises((ValueError, TypeError), match=said):
        classifier.Classifier.load(source, **settings)


class Gives(torch.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs


VARIED = torch.linspace(-1, 1, 8).reshape(4, 2)


@pytest.mark.parametrize(
    ("outputs", "settings", "said"),
    [
        (torch.full((4, 2), 0.3), {}, r"same output for all of 4 images: usually its value_range is not 0 to 1"),
        (torch.ones(4, 2), {"outputs": "probabilities"}, "same output for all"),
        (torch.full((4, 2), math.nan), {}, "gives NaN for 'A'"),
        (torch.tensor([[0.1, 1], [math.nan, 0], [0.3, 1], [0.4, 0]]), {}, "gives NaN for 'A'"),
        (
            VARIED,
            {"outputs": "probabilities"},
            "from -1 to 1, which are no probabilities: set outputs to logits",
        ),
        (VARIED / 0, {}, "gives an infinite logit for 'A'"),
        (VARIED, {"labels": ("A", "B", "C")}, r"gives \(4, 2\) for 4 images and 3 labels"),
        ({"logits": VARIED}, {}, r"gives \('dict',\) for 4 images and 2 labels"),
        (VARIED, {"labels": ("C", "D")}, r"reads C, D, but the data has A, E: set labels or rename"),
    ],
)
def test_outputs_that_cannot_be_right_are_refused(outputs, settings, said):
    made = classifier.Classifier(Gives(outputs).eval(), **{"labels": ("A", "B")} | settings)
    with pytest.raises(ValueError, match=said):
        made.checked(IMAGES, ["A", "E"])


def test_images_that_the_network_does_not_take_are_named():
    colour = classifier.Classifier(small(channels=3), ("A", "B"))
    with pytest.raises(ValueError, match=r"classifier does not take images of 1 channels and 32 pixels: .*channels"):
        colour.checked(IMAGES)
    replace(colour, channels=3).checked(IMAGES)


class Refuses(torch.nn.Module):
    def forward(self, images):
        raise NotImplementedError


def test_an_error_of_a_users_network_names_the_classifier():
    made = classifier.Classifier(Refuses().eval(), ("A", "B"), name="mine")
    with pytest.raises(ValueError, match="mine does not take images of 1 channels and 32 pixels: NotImplementedError"):
        made.checked(IMAGES)


def test_torchscript_is_code_and_needs_a_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_WEIGHTS", str(tmp_path))
    torch.jit.trace(small(), IMAGES).save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net.pt may hold code, which runs when it is loaded: set allow_code"):
        classifier.Classifier.load("net.pt", labels=["A", "B"])
    loaded = classifier.Classifier.load("net.pt", labels=["A", "B"], allow_code=True)
    torch.testing.assert_close(loaded.logits(IMAGES), classifier.Classifier(small(), ("A", "B")).logits(IMAGES))
    (tmp_path / "weights.pth").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"weights.pth cannot be read as TorchScript"):
        classifier.Classifier.load("weights.pth", labels=["A"], allow_code=True)
    for gone in ("gone.onnx", "gone.pt"):
        with pytest.raises(FileNotFoundError, match=f"no classifier at .*{gone}"):
            classifier.Classifier.load(gone, labels=["A"])


def test_onnx_without_onnxruntime_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"net.onnx needs onnxruntime: pip install onnxruntime"):
        classifier.Classifier.load(tmp_path / "net.onnx", labels=["A"])


def test_onnx_reads_what_the_network_reads(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("images", real, ["n", 1, "h", "w"])
    made = helper.make_tensor_value_info("logits", real, ["n", 2])
    scale = helper.make_tensor("scale", real, [1, 2], [10.0, -10.0])
    graph = helper.make_graph(nodes, "small", [given], [made], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    loaded = classifier.Classifier.load(tmp_path / "net.onnx", labels=["A", "B"]).checked(IMAGES)
    expected = classifier.Classifier(small(), ("A", "B")).logits(IMAGES)
    torch.testing.assert_close(loaded.logits(IMAGES), expected)
    (tmp_path / "bad.onnx").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"bad.onnx cannot be read as ONNX"):
        classifier.Classifier.load(tmp_path / "bad.onnx", labels=["A"])

"""Captions of what :mod:`paper` makes; see :mod:`captions`."""

from __future__ import annotations

from ..studies.paper import NAME as NAMES
from ..studies.paper import datasets
from .caption import Caption


def _of(dataset: str, name: str) -> dict[str, Caption]:
    same = dataset == "cifar100"
    return {
        f"{dataset}_table_1": Caption(
            f"The paper's Table 1, ours on {name}",
            "Rows: the paper's seven methods. Columns: ‖∇f‖, ‖∇²f‖, C and accuracy; ours first, ± over seeds where "
            "there are several, then in brackets the published one (CIFAR-100, ResNet-18, two runs); – not measured.",
            "Network and data are the paper's; our training is shorter, with a larger batch, and of one seed."
            if same
            else "The networks and the data differ, so compare rows, not cells.",
        ),
        f"{dataset}_table_2": Caption(
            f"The paper's Table 2, ours on {name}",
            "Rows: the paper's seven methods. Columns: accuracy in % left by PGD in L2 at five ε; ours first, then in "
            "brackets the published one (CIFAR-100, ResNet-18, two runs); – not measured.",
            "The attacks differ too: ours is stronger than that of the authors' code (20 steps that shrink from 2ε to "
            "0, margin loss; one start on CIFAR-10, five on digits and CIFAR-100).",
        ),
        f"{dataset}_cells": Caption(
            f"Every printed cell beside ours on {name}",
            "A row a printed number: ours, the published one and its dataset, the difference, and whether it is inside "
            "the joint spread √(s² + t²); “one run” where ours has no spread, – where nothing was measured.",
            "What is missing stays in the list.",
        ),
        f"{dataset}_claims": Caption(
            f"The paper's claims on {name}",
            "A row a claim: what is measured, the rule by which it holds, the published number, ours with its 95 % "
            "interval, and the verdict: holds, fails, open (the interval reaches beyond the rule), not measured.",
            "The limits in the rules are ours; notebook 8 lets you move them.",
        ),
        f"{dataset}_readings": Caption(
            f"Standard's curvature, read in two ways, on {name}",
            "Two rows: the same weights as softplus with β = 1000 and as ReLU. Columns: means and medians over test "
            "images of C of the loss, C of the margin and ‖∇²f‖.",
            "A Hessian does not see the kinks of a ReLU net: under that reading the margin has no curvature at all.",
        ),
    }


PAPER: dict[str, Caption] = {
    "claims": Caption(
        "Claims of the paper: published, ours, and where they hold",
        "Two panels of rows, a claim each, with grey bands where the claim holds, hollow diamonds for what is "
        "published and filled marks with intervals for digits, CIFAR-10 and CIFAR-100. Left, ratios on a log axis: "
        "LCNN has a lower curvature than Standard and steadier gradients, on all three by more than published; what "
        "GradReg adds to LCNN shows on both CIFARs and hardly on digits; on digits and CIFAR-10 both cost less than "
        "adversarial training. Right, percentage points: intervals of the accuracies reach beyond ± 1; on digits all "
        "gains in robustness are about 0; LCNN gains about 12 on CIFAR-10, more than published, and 5 on CIFAR-100, "
        "GradReg about 20 on CIFAR-10.",
        "LCNN's lower curvature and steadier gradients hold clearly; a step of 0.1 is too short to tell methods "
        "apart on digits.",
    ),
    **{name: caption for dataset in datasets() for name, caption in _of(dataset, NAMES[dataset]).items()},
    "cost": Caption(
        "What an epoch costs",
        "Time of an epoch over Standard's on a log axis, a point a run, the median seconds beside; a panel a dataset. "
        "On digits the fixed softplus and the ReLU net are cheaper than Standard, CURE is the dearest, adversarial "
        "training and LCNN + GradReg come next. On CIFAR-10 adversarial training is the dearest; LCNN's epochs lie "
        "beside Standard's. On CIFAR-100, where three methods were trained, LCNN takes 1.4 and LCNN + GradReg 2.4 "
        "times Standard's.",
        "Rough, on shared CPU cores, CIFAR-100 on a GPU with its compiling; benchmarks/results/training_steps_cpu.md "
        "has steps timed in turn.",
    ),
    "train_test_curvature": Caption(
        "Curvature on training and on test images",
        "Mean C on test images against that on training images, log axes, a point a run; a panel a dataset. All "
        "points lie close to the dotted line of equality, the LCNNs at its lower end, Standard at its upper.",
        "Here C generalises by itself, whether a method's penalty sees training images or only weights.",
    ),
    "layers": Caption(
        "β and γ of every layer after training",
        "Left β, right γ, from input to output; above digits, below CIFAR-10; dotted, where they started. On digits β "
        "ends between 1.5 and 2 but for the last layer's, γ between 6.5 and 8.5. On CIFAR-10 β ends between 1 and 5, γ "
        "between 1 and 17, with two layers at 1.",
        "β falls least in the last activation; on CIFAR-10 two γ, of shortcuts, end at 1, where their price is 0.",
    ),
    "saliency_gallery": Caption(
        "Saliency maps of four networks on digits",
        "Four digits in rows, then their gradient maps by Standard, GradReg, LCNN and LCNN + GradReg, then the same by "
        "SmoothGrad; red pixels speak for the label, blue ones against it. The two LCNNs' maps look alike, and like "
        "their own SmoothGrad; Standard's gradient differs from digit to digit of one class.",
        "Each network has a picture of its own; the low-curvature ones need no smoothing.",
    ),
    "lambda_search": Caption(
        "Choosing λ on held-out images",
        "Against λ, LCNNs on digits that were trained without a fifth of the training set, judged by that fifth: (a) "
        "accuracy, 98 to 99 % up to λ = 0.03, then falling, to 8 % at 0.3; (b) the same near its best, with a band of "
        "one standard error; (c) C, falling from 5 to below 1, and to nothing at 0.3. A ring marks the chosen λ, 0.01.",
        "The rule of one standard error takes the largest λ within one standard error of the best; it is the λ of the "
        "digits' recipes.",
    ),
}

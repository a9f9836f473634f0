"""What every figure and table is called, shows and says, for figures/README.md; the README's alt texts are these.

A test asks for one caption for each name that :data:`gallery.STEPS` makes, and for none besides. Alt texts say what is
seen, to somebody who doesn't see it; a reading says what follows.
"""

from __future__ import annotations

from .caption import Caption
from .captions_paper import PAPER

SECTIONS: dict[str, dict[str, Caption]] = {  # in the order of the page
    "Softplus and its sharpness β (notebook 1)": {
        "figure_1c": Caption(
            "The paper's Figure 1 (c): softplus, plain and centered",
            "Left: plain softplus for four values of β; the smaller β, the higher the curve floats above the ReLU. "
            "Right: centered softplus; all curves pass through the origin, between x/2 and the ReLU.",
            "Centering takes away the offset log(2)/β, which would grow as β falls.",
        ),
        "activations": Caption(
            "Value, slope and curvature of three activations",
            "Three panels for β = 2. Value: softplus lies above the ReLU and meets it at both ends, centered softplus "
            "passes through the origin and runs below the ReLU. Slope: the ReLU's jumps from 0 to 1, both softplus "
            "climb along one S-shaped curve. Curvature: both softplus share one bell of height 0.5, the ReLU's is 0.",
            "Centered softplus differs from softplus by a constant alone, so slope and curvature are the same; the "
            "curvature is highest at 0, where it is β/4.",
        ),
        "composition": Caption(
            "What a stack of activations does to its input",
            "Six panels: above plain, below centered softplus, for β = 0.5, 2 and 10, each composed 1, 2, 5 and 10 "
            "times. The plain curves rise with every layer, most for β = 0.5. The centered ones all pass through the "
            "origin and flatten with every layer, for β = 0.5 to nearly 0.",
            "Plain softplus runs off with depth; the centered one stays at 0 but halves a small signal in each layer, "
            "which weights have to make up for.",
        ),
        "normalised_curvature": Caption(
            "Curvature over slope of centered softplus",
            "Curvature over slope against β, both logarithmic, below a straight line, the bound β. At x = −1 the curve "
            "joins the bound from β = 10 on, at x = 0 it stays at half of it, at x = 0.1 and x = 1 it turns and falls "
            "steeply, the sooner the larger x.",
            "β bounds what an activation adds to the normalised curvature, and the bound is reached on the side where "
            "the activation is nearly shut.",
        ),
    },
    "Curvature of a network (notebook 2)": {
        "figure_1ab": Caption(
            "The paper's Figure 1 (a, b): two moons",
            "Two columns, a Standard net and an LCNN, on two moons. Above, the decision regions: both separate the "
            "moons. Below, the curvature of the margin: a web of thin bright lines for the Standard net, a smooth glow "
            "without peaks for the LCNN.",
            "Standard is curved in its kinks, the LCNN a little everywhere.",
        ),
        "digits_curvature": Caption(
            "Curvature on digits: every test image, and the means",
            "Left: cumulative distributions of normalised curvature over test images, one curve a seed: the LCNN's lie "
            "around 6, Standard's spread from 5 to over 100, Standard read as ReLU around 4. Right: the means against "
            "test accuracy with error bars.",
            "The LCNN is less curved at about the same accuracy; reading Standard's weights as ReLUs hides its kinks "
            "from the Hessian and takes none away.",
        ),
        "digits_geometry": Caption(
            "Curvature on digits: the numbers",
            "Rows: Standard, its weights read as ReLU, and LCNN (λ = 0.001). Columns: gradient, Hessian norm and "
            "normalised curvature of the loss, that of the margin, accuracy, median curvature.",
            "Mean over images, then mean ± standard deviation over seeds; a ReLU net's margin has no curvature where "
            "it has a Hessian at all.",
        ),
        "convergence": Caption(
            "How many products the norm of a Hessian takes",
            "Relative error of ‖∇²f‖ against Hessian-vector products, logarithmic, median and middle 80 % of samples. "
            "Lanczos falls to about 10⁻⁵ after five products; the two power iterations take twice as many or more, the "
            "published reading |uᵀHu| the most, and their bands still reach above 1 % after nine.",
            "Lanczos needs less than half as many products as power iteration, and far fewer images lag behind.",
        ),
    },
    "The layerwise bound (notebook 3)": {
        "bound_waterfall": Caption(
            "Which layer the curvature bound comes from",
            "Three columns: a three-layer LCNN, and the ResNet-10 as LCNN and Standard. Above, the share of the bound "
            "that each activation adds: nearly all comes from the last ones. Below, the factors: the slope up to a "
            "layer grows, the reach from there to the output falls, β stays at 4 to 7 in the LCNN ResNet, at 1000 in "
            "Standard.",
            "The slope enters squared and grows through the net, so that the last layers make the bound K, and K "
            "is astronomical for the ResNets.",
        ),
        "bounds_on_random_nets": Caption(
            "The bounds on random networks",
            "Left: the share of points whose bound over exact value lies below x, for three bounds: no curve starts "
            "left of 1; the local one is tightest, the data-free one loosest. Right: C over the published bound "
            "against the alignment factor κ: most points lie below 1, a few crosses above it, all at κ above 10.",
            "Bounds (A), (B) and (C) hold throughout; the published form fails at some points, all of which have a "
            "large κ.",
        ),
        "certified_accuracy": Caption(
            "What can be proved, and what an attack leaves",
            "Correct test images against the length ε of the step, for four nets: solid, certified; dashed, left by "
            "PGD. The dashed lines lie close together. Standard's solid line falls to 0 at once; that of the LCNN with "
            "λ = 0.1 stays close to its dashed line up to about 0.3, that of the linear net throughout.",
            "PGD finds the four nets about equally robust up to ε ≈ 0.4; next to nothing of it can be proved of "
            "Standard, most of it of the LCNNs at short steps.",
        ),
        "digits_certified": Caption(
            "What can be proved: the numbers",
            "Rows: Standard, two LCNNs and a linear net. Columns: accuracy, and for four lengths of the step the share "
            "of images that is certified, in brackets what PGD leaves.",
            "The truth lies between the two numbers of a cell; the lower the curvature bound, the closer they are.",
        ),
    },
    "Training methods (notebook 5)": {
        "digits_methods": Caption(
            "Nine ways to train the same network",
            "Test accuracy against C, left of the loss, right of the margin, a point with error bars a method. All "
            "accuracies lie between 97 and 99 %. C of the loss is around 5 for the LCNN, LCNN + GradReg, the minimal "
            "recipe and softplus with a fixed β, around 30 for Standard, GradReg, CURE and adversarial training, 14 "
            "for the ordinary ReLU net. In C of the margin the fixed softplus lies at about 4, the three with a "
            "trained β at 2.",
            "A low β gives a low curvature, however the network got it, at no visible cost in accuracy here.",
        ),
        "digits_methods_table": Caption(
            "Nine ways to train: the numbers, beside the paper's",
            "Rows: the methods. Columns: gradient, Hessian norm, C and accuracy on digits, then the paper's C and "
            "accuracy on CIFAR-100.",
            "LCNN + GradReg has the lowest C of all in both; GradReg, CURE and adversarial training lower it less here "
            "than in the paper.",
        ),
        "digits_ingredients": Caption(
            "What does the work in an LCNN",
            "Rows: the same LCNN from different first values of β, with the prices of β and γ on and off; last, a "
            "trained Standard net whose β is set. Columns: accuracy, C of loss and margin, median β and γ.",
            "Any road to a moderate β lowers C; the Lipschitz layers and the price of γ alone do not.",
        ),
        "digits_lambda": Caption(
            "What the price λ buys",
            "Four panels against λ from 0 to 0.3: accuracy stays near 98 % up to 0.03, dips at 0.1 and falls to 10 % "
            "at 0.3; C falls slowly and then collapses at 0.3; β of every layer falls to 0.01, the last layer's last; "
            "γ spreads over the layers and ends at 1.",
            "There is a wide range of prices that cost nothing, and a cliff behind it.",
        ),
        "signal": Caption(
            "A network that dies of too large a price",
            "Spread of the signal over images against depth, logarithmic, for six nets that all start at 0.3. It stays "
            "there, with small dips, for the healthy net, those with one price too large and a quarter of both prices "
            "over four times the epochs; falls steadily to 10⁻⁵ with both too large; and dips to 0.01 and recovers "
            "with both too large over four times the epochs.",
            "Only both prices together extinguish the signal, and a longer schedule lets the weights make up for it.",
        ),
    },
    "The two promises (notebooks 6 and 7)": {
        "gradient_robustness": Caption(
            "The paper's gradient-robustness figure",
            "Relative change of the gradient against the length of the noise, eight panels with dashed lines above: "
            "digits, CIFAR-10 and CIFAR-100, each for random and worst noise, and the paper's two. Under random noise "
            "the lines of all networks run far below their dashed lines, LCNN + GradReg lowest, then LCNN (on digits "
            "they coincide), GradReg and Standard; on CIFAR-100 Standard's runs close to the published one. Under the "
            "worst noise the LCNNs' lines follow their dashed ones; on CIFAR-100 they leave them upwards from a length "
            "of 0.025 on, where LCNN's meets Standard's.",
            "Low curvature means steady gradients under random noise; the worst noise changes the order.",
        ),
        "pgd_l2": Caption(
            "Accuracy under attack, L2",
            "Accuracy left by PGD against ε in L2: on digits the nine methods lie close together, adversarial training "
            "highest; on CIFAR-10 LCNN + GradReg is highest, then adversarial training and GradReg, then LCNN and the "
            "fixed softplus, Standard lowest; on CIFAR-100, where two nets were attacked, LCNN lies a little above "
            "Standard; in the paper's panel at the right LCNN and the fixed softplus lie next to Standard, the others "
            "close together above.",
            "A penalty on the gradient, or training on attacked images, does most of the work.",
        ),
        "pgd_linf": Caption(
            "Accuracy under attack, L∞",
            "Accuracy left by PGD against ε in L∞. On digits nine curves fall together to nearly 0, adversarial "
            "training's clearly highest. On CIFAR-10 the curves fall far sooner: Standard's first, then those of the "
            "fixed softplus and LCNN, then GradReg's, and those of adversarial training and LCNN + GradReg last.",
            "The order is that of L2.",
        ),
        "digits_promises": Caption(
            "Both promises on digits",
            "Rows: the methods. Columns: accuracy, what survives PGD at ε = 0.1, change of the gradient under random "
            "noise and how many times steadier than Standard, change under the worst noise.",
            "The methods differ little under attack and much in how steady their gradients are under random noise.",
        ),
        "cifar10_promises": Caption(
            "Both promises on CIFAR-10",
            "Rows: the methods measured. Columns: accuracy, what survives PGD at ε = 0.1, change of the gradient under "
            "random noise and how many times steadier than Standard, change under the worst noise.",
            "LCNN + GradReg survives most and has the steadiest gradients, at some cost in accuracy.",
        ),
        "digits_pgd": Caption(
            "Accuracy under attack on digits: the numbers",
            "Rows: the methods. Columns: accuracy left by PGD at five ε in L2; in brackets the paper's, on CIFAR-100.",
            "On digits these ε hurt little; the paper's numbers belong to a harder task.",
        ),
        "cifar10_pgd": Caption(
            "Accuracy under attack on CIFAR-10: the numbers",
            "Rows: the methods measured. Columns: accuracy left by PGD at five ε in L2; in brackets the paper's, on "
            "CIFAR-100.",
            "The order at ε = 0.1 is the paper's but for the first two.",
        ),
        "digits_masking": Caption(
            "Is the attack to be believed?",
            "Rows: PGD, checks for masked gradients, and AutoAttack as a referee. Columns: four methods; a tick where "
            "the check is passed.",
            "The margin loss passes every check; cross-entropy on logits × 100 shows what masking looks like.",
        ),
    },
    "The paper, claim by claim (notebook 8)": PAPER,
}
CAPTIONS = {name: caption for section in SECTIONS.values() for name, caption in section.items()}

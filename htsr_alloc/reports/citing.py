"""The papers behind the numbers of a file, and which of them it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.records import Allocation, Settings


@dataclass(frozen=True)
class Reference:
    """A BibTeX entry: ``fields`` in order, ``why`` it is cited here."""

    key: str
    kind: str
    why: str
    fields: tuple[tuple[str, str], ...]

    @property
    def url(self) -> str:
        """Where to read it."""
        return dict(self.fields)["url"]

    @property
    def line(self) -> str:
        """Authors, title, year, as prose."""
        field = dict(self.fields)
        authors = field["author"].split(" and ")
        names = [" ".join(reversed(name.split(", "))) for name in authors]
        said = names[0] + (" et al." if len(names) > 1 else "")
        return f"{said}: {field['title'].replace('{', '').replace('}', '')}, {field['year']}"

    @property
    def bibtex(self) -> str:
        """The entry."""
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in self.fields)
        return f"@{self.kind}{{{self.key},\n{body}\n}}"


ALPHALORA = Reference(
    "qing2024alphalora",
    "inproceedings",
    "PL_Alpha_Hill of a layer as the measure of its training, and the allocation",
    (
        (
            "author",
            "Qing, Peijun and Gao, Chongyang and Zhou, Yefan and Diao, Xingjian and "
            "Yang, Yaoqing and Vosoughi, Soroush",
        ),
        ("title", "{AlphaLoRA}: Assigning {LoRA} Experts Based on Layer Training Quality"),
        ("booktitle", "Proceedings of EMNLP"),
        ("pages", "20511--20523"),
        ("year", "2024"),
        ("url", "https://arxiv.org/abs/2410.10054"),
    ),
)
ALPHAPRUNING = Reference(
    "lu2024alphapruning",
    "inproceedings",
    "the estimator official",
    (
        (
            "author",
            "Lu, Haiquan and Zhou, Yefan and Liu, Shiwei and Wang, Zhangyang and "
            "Mahoney, Michael W. and Yang, Yaoqing",
        ),
        (
            "title",
            "{AlphaPruning}: Using Heavy-Tailed Self Regularization Theory for Improved "
            "Layer-wise Pruning of Large Language Models",
        ),
        ("booktitle", "Advances in Neural Information Processing Systems"),
        ("year", "2024"),
        ("url", "https://arxiv.org/abs/2410.10912"),
    ),
)
TEMPBALANCE = Reference(
    "zhou2023tempbalance",
    "inproceedings",
    "PL_Alpha_Hill, and the estimator median",
    (
        (
            "author",
            "Zhou, Yefan and Pang, Tianyu and Liu, Keqin and Martin, Charles H. and "
            "Mahoney, Michael W. and Yang, Yaoqing",
        ),
        ("title", "Temperature Balancing, Layer-wise Weight Analysis, and Neural Network Training"),
        ("booktitle", "Advances in Neural Information Processing Systems"),
        ("year", "2023"),
        ("url", "https://arxiv.org/abs/2312.00359"),
    ),
)
FARMS = Reference(
    "hu2025farms",
    "inproceedings",
    "FARMS windows",
    (
        ("author", "Hu, Yuanzhe and Goel, Kinshuk and Killiakov, Vlad and Yang, Yaoqing"),
        ("title", "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias"),
        ("booktitle", "Proceedings of the 42nd International Conference on Machine Learning"),
        ("year", "2025"),
        ("url", "https://arxiv.org/abs/2506.06280"),
    ),
)
WEIGHTWATCHER = Reference(
    "martin2021predicting",
    "article",
    "spectra of weights without data, and Alpha_Hat",
    (
        ("author", "Martin, Charles H. and Peng, Tongsu and Mahoney, Michael W."),
        (
            "title",
            "Predicting trends in the quality of state-of-the-art neural networks without access "
            "to training or testing data",
        ),
        ("journal", "Nature Communications"),
        ("volume", "12"),
        ("number", "4122"),
        ("year", "2021"),
        ("url", "https://doi.org/10.1038/s41467-021-24025-8"),
    ),
)
CLAUSET = Reference(
    "clauset2009power",
    "article",
    "the start of a tail by least KS distance",
    (
        ("author", "Clauset, Aaron and Shalizi, Cosma Rohilla and Newman, M. E. J."),
        ("title", "Power-Law Distributions in Empirical Data"),
        ("journal", "SIAM Review"),
        ("volume", "51"),
        ("number", "4"),
        ("pages", "661--703"),
        ("year", "2009"),
        ("url", "https://arxiv.org/abs/0706.1062"),
    ),
)
MOLA = Reference(
    "gao2025mola",
    "inproceedings",
    "MoLA's groups, here or as a baseline",
    (
        (
            "author",
            "Gao, Chongyang and Chen, Kezhen and Rao, Jinmeng and Liu, Ruibo and Sun, Baochen and "
            "Zhang, Yawen and Peng, Daiyi and Guo, Xiaoyuan and Subrahmanian, V. S.",
        ),
        ("title", "{MoLA}: {MoE} {LoRA} with Layer-wise Expert Allocation"),
        ("booktitle", "Findings of the Association for Computational Linguistics: NAACL 2025"),
        ("pages", "5097--5112"),
        ("year", "2025"),
        ("url", "https://arxiv.org/abs/2402.08562"),
    ),
)

_OF_ESTIMATOR = {
    "official": (ALPHALORA, ALPHAPRUNING),
    "paper": (ALPHALORA,),
    "median": (TEMPBALANCE,),
    "ks": (CLAUSET,),
}


def references(settings: Settings, allocations: Sequence[Allocation]) -> tuple[Reference, ...]:
    """What a result with these settings and allocations rests on, each once."""
    found = [*_OF_ESTIMATOR.get(settings.estimator, ()), TEMPBALANCE, WEIGHTWATCHER]
    if settings.farms:
        found.append(FARMS)
    if any(a.strategy and a.strategy.name == "alphalora" for a in allocations):
        found.append(ALPHALORA)
    if allocations:
        found.append(MOLA)
    return tuple(dict.fromkeys(found))

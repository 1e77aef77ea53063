"""Artifacts: directories with a manifest, the only thing that travels between steps.
`kinds` says what an artifact may be, `facts` what is known of each, `manifest` what is written about it, `tree` how its
bytes are digested, and `store` how it is published and found again. Nothing here knows a training library, Prefect or
MLflow.
"""

from steps.artifacts.atomic import cut_half_line, read_lines, write_atomic
from steps.artifacts.facts import (
    AdapterFacts,
    DatasetFacts,
    DocumentsFacts,
    Facts,
    FourBit,
    ModelFacts,
    PackageFacts,
    PreferencesFacts,
    QuantizedFacts,
    ReportFacts,
    SamplesFacts,
)
from steps.artifacts.kinds import (
    KINDS,
    Adapter,
    Artifact,
    Dataset,
    Documents,
    Draft,
    Model,
    Package,
    Preferences,
    Quantized,
    Report,
    RewardModel,
    Samples,
    kind_named,
)
from steps.artifacts.manifest import MANIFEST_NAME, Manifest, Parent
from steps.artifacts.store import CorruptArtifact, Store
from steps.artifacts.tree import FileDigest, Tree, digest_file, digest_tree, link_or_copy

__all__ = [
    "KINDS",
    "MANIFEST_NAME",
    "Adapter",
    "AdapterFacts",
    "Artifact",
    "CorruptArtifact",
    "Dataset",
    "DatasetFacts",
    "Documents",
    "DocumentsFacts",
    "Draft",
    "Facts",
    "FileDigest",
    "FourBit",
    "Manifest",
    "Model",
    "ModelFacts",
    "Package",
    "PackageFacts",
    "Parent",
    "Preferences",
    "PreferencesFacts",
    "Quantized",
    "QuantizedFacts",
    "Report",
    "ReportFacts",
    "RewardModel",
    "Samples",
    "SamplesFacts",
    "Store",
    "Tree",
    "cut_half_line",
    "digest_file",
    "digest_tree",
    "kind_named",
    "link_or_copy",
    "read_lines",
    "write_atomic",
]

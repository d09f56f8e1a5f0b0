"""CLIP-MoE: a CLIP whose feed-forward networks are mixtures of experts (arXiv 2409.19291).

Importing the package registers its classes with transformers' Auto* classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification

from vision_moe import diagnostics, routing_survey
from vision_moe.caption_labels import CaptionLabels
from vision_moe.caption_sets import CaptionSet, read_caption_set
from vision_moe.checkpoint import empty_model, load, read_config, save
from vision_moe.clustering import accumulate_labels, num_occupied_clusters, stage_labels
from vision_moe.configuration import OPENAI_PREPROCESS, CLIPMoEConfig, CLIPMoEVisionConfig
from vision_moe.convert import convert_clip_moe
from vision_moe.convert_low_rank import BlockError, convert_low_rank, error_table, to_low_rank
from vision_moe.encoding import ImageFeatures, encode_images, encode_texts
from vision_moe.errors import InputError
from vision_moe.expert_spread import spread_experts, spread_low_rank_experts
from vision_moe.feature_shards import FeatureShards
from vision_moe.files import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_text,
    sha256_file,
    writable_folder,
)
from vision_moe.losses import contrastive_loss
from vision_moe.low_rank import LowRankExperts, LowRankFFN
from vision_moe.modeling import (
    CLIPMoEModel,
    CLIPMoEOutput,
    CLIPMoEVisionModel,
    CLIPMoEVisionOutput,
    open_clip_description,
)
from vision_moe.moe import MoEFeedForward, load_balancing_loss
from vision_moe.preprocessing import open_image, to_rgb
from vision_moe.products import num_filling_rows, pytorch_products
from vision_moe.quiet import no_library_progress_bars
from vision_moe.retrieval import (
    RetrievalRanks,
    encode_pairs,
    retrieval_ranks,
    retrieval_recall,
)
from vision_moe.routers import RouterOptions
from vision_moe.routing import (
    RoutingRecord,
    fixed_mixture,
    force_expert,
    moe_layers,
    record_routing,
    uniform_routing,
    without_expert,
)
from vision_moe.sampler import ClusterBatchSampler
from vision_moe.surgery import (
    FFNSite,
    attention_beside,
    ffn_state_dict,
    find_ffns,
    insert_moe,
    load_ffn_state_dict,
    upcycle,
)
from vision_moe.text_context import stretch_text_context
from vision_moe.zero_shot import (
    ClassFolder,
    class_features,
    read_class_folder,
    zero_shot_metrics,
    zero_shot_ranks,
)

AutoConfig.register(CLIPMoEConfig.model_type, CLIPMoEConfig)
AutoConfig.register(CLIPMoEVisionConfig.model_type, CLIPMoEVisionConfig)
AutoModel.register(CLIPMoEConfig, CLIPMoEModel)
AutoModelForZeroShotImageClassification.register(CLIPMoEConfig, CLIPMoEModel)
AutoModel.register(CLIPMoEVisionConfig, CLIPMoEVisionModel)

__all__ = [
    "OPENAI_PREPROCESS",
    "BlockError",
    "CLIPMoEConfig",
    "CLIPMoEModel",
    "CLIPMoEOutput",
    "CLIPMoEVisionConfig",
    "CLIPMoEVisionModel",
    "CLIPMoEVisionOutput",
    "CaptionLabels",
    "CaptionSet",
    "ClassFolder",
    "ClusterBatchSampler",
    "FFNSite",
    "FeatureShards",
    "ImageFeatures",
    "InputError",
    "LowRankExperts",
    "LowRankFFN",
    "MoEFeedForward",
    "RetrievalRanks",
    "RouterOptions",
    "RoutingRecord",
    "accumulate_labels",
    "atomic_directory",
    "atomic_write_bytes",
    "atomic_write_text",
    "attention_beside",
    "class_features",
    "contrastive_loss",
    "convert_clip_moe",
    "convert_low_rank",
    "diagnostics",
    "empty_model",
    "encode_images",
    "encode_pairs",
    "encode_texts",
    "error_table",
    "ffn_state_dict",
    "find_ffns",
    "fixed_mixture",
    "force_expert",
    "insert_moe",
    "load",
    "load_balancing_loss",
    "load_ffn_state_dict",
    "moe_layers",
    "no_library_progress_bars",
    "num_filling_rows",
    "num_occupied_clusters",
    "open_clip_description",
    "open_image",
    "read_caption_set",
    "read_class_folder",
    "pytorch_products",
    "read_config",
    "record_routing",
    "retrieval_ranks",
    "retrieval_recall",
    "routing_survey",
    "save",
    "sha256_file",
    "spread_experts",
    "spread_low_rank_experts",
    "stage_labels",
    "stretch_text_context",
    "to_low_rank",
    "to_rgb",
    "uniform_routing",
    "upcycle",
    "without_expert",
    "writable_folder",
    "zero_shot_metrics",
    "zero_shot_ranks",
]

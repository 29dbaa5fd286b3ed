"""Verify a written folder by loading it as its users will."""

from collections.abc import Mapping

from gblm_compress.calibration.weights import ResidentWeights, StreamedWeights
from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.methods.zeros import count_nonzeros
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource


def verify_by_loading(written: ModelSource, nonzeros: Mapping[str, int], offload: bool = False) -> None:
    """Load the folder as its users will, and compare with {pruned layer: nonzeros}.

    `offload` loads block by block, where the model does not fit in memory. Raises VerificationError.
    """
    try:
        model = loading.load_skeleton(written) if offload else loading.load_model(written)
        weights = StreamedWeights(written, model, "cpu") if offload else ResidentWeights(model)
        loading.load_processor(written)
    except ModelError as error:
        raise VerificationError(f"the written folder does not load: {error}") from error
    for index in range(len(weights.blocks)):
        with weights.block(index):
            for name, kept in nonzeros.items():
                if not name.startswith(f"{weights.prefix}.{index}."):
                    continue
                found = count_nonzeros(weights.model.get_submodule(name).get_parameter("weight"))
                if found != kept:
                    raise VerificationError(
                        f"{name}: transformers loads {found} nonzeros from the written folder, and {kept} were kept"
                    )

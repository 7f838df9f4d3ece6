import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from minillm.model.classifier import Classifier
from minillm.model.huggingface import load_pretrained


def test_scores_equal_hugging_faces_class(tmp_path):
    torch.manual_seed(0)
    theirs = LlamaForSequenceClassification(LlamaConfig(vocab_size=67, hidden_size=36, num_hidden_layers=2, num_attention_heads=6, num_labels=3,
                                                        intermediate_size=50, bos_token_id=1, eos_token_id=1, pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    from transformers import LlamaForCausalLM
    language_model = LlamaForCausalLM(theirs.config)
    language_model.model.load_state_dict(theirs.model.state_dict())
    language_model.save_pretrained(tmp_path)
    ours = Classifier(load_pretrained(tmp_path), 3)
    with torch.no_grad():
        ours.score.weight.copy_(theirs.score.weight)
    ids, real = torch.randint(1, 67, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    ids[0, :3], real[0, :3] = 0, False
    places = (real.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=real.long(), position_ids=places).logits
        torch.testing.assert_close(ours(ids, real), expected, rtol=1e-5, atol=1e-5)  # float32: sums in another order
    with pytest.raises(ValueError, match="row 1 ends in padding"):
        ours(ids.flip(0).flip(1), real.flip(0).flip(1))

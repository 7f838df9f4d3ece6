"""`minillm chat`: what is typed and what is shown, in this process and as a command; and the same in a notebook."""

import io
import shutil

import pytest
import torch
from commands import ended, start

from minillm.cli import main
from minillm.course.chat_widget import answering, chat_box, render_conversation
from minillm.course.pretrained import CHAT, FOLDER, load_course_chat
from minillm.progress import show_progress
from minillm.text.chat import TEMPLATES


def chat(capsys, monkeypatch, typed, *words):
    """The command with lines typed into it: exit code, output, errors."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    state = torch.get_rng_state()
    with pytest.raises(SystemExit) as end:
        main(["chat", *map(str, words)])
    torch.set_rng_state(state)
    show_progress(False)
    return end.value.code or 0, *capsys.readouterr()


def test_questions_from_the_command_line():
    code, out, err = ended(start("chat", CHAT, "--temperature", "0", "--question", "40+21=", "What is 5+6?"))
    assert code == 0, err
    assert out.startswith("you: 40+21=\nmodel: 61\n\nyou: What is 5+6?\nmodel: ") and out.count("model: ") == 2


def test_commands_while_talking(capsys, monkeypatch):
    code, out, err = chat(capsys, monkeypatch, "/stats\n40+21=\n/stats\n/undo\n/dance\n/new\n\n50+30=\n/exit\n1+1=\n", CHAT, "--temperature", "0")
    assert code == 0, err
    assert "Nothing was answered yet." in out and "model: 61" in out and "model: 80" in out and out.count("model: ") == 2
    assert "tokens/s; the conversation has 2 messages." in out and "/dance is no command. /new starts over" in out


def test_undo_takes_back_what_the_model_was_told(capsys, monkeypatch):
    """The same question after a turn that was taken back is answered as if that turn had not been."""
    once = chat(capsys, monkeypatch, "Tell me a story about a fox.\n", CHAT, "--temperature", "0")[1]
    again = chat(capsys, monkeypatch, "3+4=\n/undo\nTell me a story about a fox.\n", CHAT, "--temperature", "0")[1]
    assert once.split("model: ")[1] == again.split("model: ")[2] and len(once.split("model: ")[1]) > 60


def test_the_system_message_is_never_taken_back(capsys, monkeypatch):
    words = ["--system", "Be brief.", "--temperature", "0"]
    alone = chat(capsys, monkeypatch, "40+21=\n/stats\n", CHAT, *words)[1]
    undone = chat(capsys, monkeypatch, "/undo\n3+4=\n/undo\n/undo\n40+21=\n/stats\n", CHAT, *words)[1]
    assert "has 3 messages" in alone and "has 3 messages" in undone
    assert undone.split("model: ")[2].split("\n")[0] == alone.split("model: ")[1].split("\n")[0]


def test_a_seed_repeats_and_the_end_of_input_ends(capsys, monkeypatch):
    asked = "Tell me a story about a bear.\n"
    first, same, other = (chat(capsys, monkeypatch, asked, CHAT, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == same != other


def test_a_long_conversation_forgets_its_beginning(capsys, monkeypatch):
    code, out, err = chat(capsys, monkeypatch, "12+34=\n" * 14, CHAT, "--temperature", "0")
    assert code == 0 and "turn no longer fit" in out.replace("turns", "turn"), err
    code, out, _ = chat(capsys, monkeypatch, "1" * 400 + "\n2+3=\n", CHAT, "--temperature", "0")
    assert code == 0 and "the question takes" in out and "model: " in out  # the conversation goes on


def test_ctrl_c_stops_the_answer_and_not_the_conversation(capsys, monkeypatch):
    from minillm.infer import answer

    def interrupted(*args, **options):
        yield "Once"
        raise KeyboardInterrupt
    monkeypatch.setattr(answer, "stream_answer", interrupted)
    code, out, err = chat(capsys, monkeypatch, "Tell me a story.\n/stats\n", CHAT)
    assert code == 0 and "model: Once ..." in out and "has 2 messages" in out, err


def test_what_cannot_work_is_said(capsys, monkeypatch, tmp_path):
    code, _, err = chat(capsys, monkeypatch, "", CHAT, "--template", "mistral")
    assert code == 2 and "--template mistral: there are minillm, chatml" in err
    code, _, err = chat(capsys, monkeypatch, "", CHAT, "--template", "llama2", "--question", "1+1=")
    assert code == 2 and "the tokenizer has no '<s>'" in err
    code, _, err = chat(capsys, monkeypatch, "", tmp_path)
    assert code == 2 and "holds no checkpoint" in err
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "trainer.json").write_text("{}")
    code, out, err = chat(capsys, monkeypatch, "", tmp_path, "--question", "1+1=", "--max-new-tokens", "3")
    assert code == 0 and "has been pretrained only" in out, err


def test_the_figure_shows_what_was_said_as_text():
    page = render_conversation([{"role": "user", "content": "<b>1 & 2</b>"}, {"role": "assistant", "content": ""}])
    assert "&lt;b&gt;1 &amp; 2&lt;/b&gt;" in page and "<b>" not in page and "…" in page


def test_the_box_answers():
    model, tokenizer = load_course_chat()
    talk = [{"role": "user", "content": "40+21="}]
    grown = [whole[-1]["content"] for whole in answering(model, tokenizer, TEMPLATES["minillm"], talk, 20, 0.0)]
    assert grown[-1] == "61" and all(later.startswith(earlier) for earlier, later in zip(grown, grown[1:]))
    box = chat_box(model, tokenizer, TEMPLATES["minillm"], ["40+21="], seed=0)
    shown, (typed, send, anew), heat, note = box.children[0], box.children[1].children, box.children[2], box.children[3]
    heat.value = 0.0
    typed.value = "50+30="
    assert shown.value.count("40+21=") == 1 and "50+30=" in shown.value and ">80<" in shown.value and typed.value == ""
    typed.value = "9" * 300
    assert "the question takes" in note.value and "999" not in typed.value
    anew.click()
    assert shown.value == note.value == ""

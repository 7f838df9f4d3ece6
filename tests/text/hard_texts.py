"""Texts that are hard on tokenizers: scripts, emoji, spaces, long words, broken surrogate pairs."""

HARD_TEXTS = [
    "", " ", "\n", "a", "  two  spaces ", "tabs\tand\r\nline ends\n\n\n  indented\n", "   ", "\n \n ",
    "\u3000\u2003x", "don't, WON'T, it'll, we've I'm 'tis 'S 'ſ", "12 1234567 3.14 1,000 ½ ² Ⅷ ٣٤٥",
    "snake_case camelCase x+=1;//!?",
    "Ein Größenwahn über Straßen", "Съешь ещё этих мягких французских булок", "我们今天去吃饭。很好！",
    "ひらがなとカタカナ", "مرحبا بالعالم", "नमस्ते दुनिया", "한국어 문장", "ไม่มีช่องว่าง", "e\u0301 = é",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪 😀😀", "𝒜𝔘𝟙", "\x00\x01\x1c\x7f\x85\ufeff\ufffd", "a\u200bb\u00a0c\u00add",
    "<|endoftext|> and <|user|>", "a" * 1000, " " * 300 + "x", "ab" * 500,
    "\ud800", "x\udc80y", "\ud83d\ude00", "\ude00\ud83d ",
]

"""Cleaning: the same text, written in one way, before anything learns from it.

The tokenizer never does this by itself: it gives back every byte that it was given. Cleaning is a decision
about a corpus, made once, before training. The steps run in an order in which none undoes another, so that
cleaning twice changes nothing more.

Left out: HTML, personal data, and what decides about whole documents: language, quality and duplicates
(minillm.data.quality).
"""

import re
import unicodedata
from typing import Literal

# Invisible characters without meaning: byte order mark, soft hyphen, zero-width space, word joiner, and the
# marks of writing direction. The joiners U+200C and U+200D stay: Persian, Hindi and emoji need them.
_INVISIBLE = "\ufeff\u00ad\u200b\u2060\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069"
_CONTROLS = re.compile(f"[\x00-\x08\x0e-\x1f\x7f-\x9f{_INVISIBLE}]")
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_OTHER_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")  # Unicode's Zs without " "
_SPACES_AT_LINE_END = re.compile("[ \t]+(?=\n|$)")
_SPACE_RUN = re.compile("[ \t]+")
_INDENTS = re.compile("\n[ \t]+")

# Traditional, then simplified: a small hand-made example, 240 common characters that differ. It maps them one
# by one, so it cannot know what depends on the word (乾 is 干 in 餅乾 but stays in 乾坤; 著 is 着 in 看著 but
# stays in 著名): such characters are left out. Real projects use a dictionary of phrases.
_TRADITIONAL_SIMPLIFIED = """
    這这 個个 們们 來来 時时 會会 說说 國国 過过 學学 對对 發发 後后 經经 現现 動动 進进 樣样 從从 還还
    開开 實实 點点 問问 長长 見见 兩两 無无 種种 體体 電电 話话 東东 車车 門门 馬马 鳥鸟 魚鱼 風风 飛飞
    書书 買买 賣卖 錢钱 貝贝 員员 寫写 讀读 語语 讓让 請请 謝谢 認认 識识 記记 計计 許许 論论 設设 訪访
    證证 評评 詞词 試试 詩诗 該该 詳详 誤误 調调 談谈 議议 護护 變变 觀观 覺觉 親亲 視视 規规 頭头 題题
    顏颜 願愿 類类 顯显 預预 領领 頁页 順顺 須须 飯饭 館馆 飲饮 餓饿 養养 雙双 難难 離离 雞鸡 雜杂 雲云
    靈灵 靜静 響响 韓韩 項项 齊齐 齒齿 龍龙 龜龟 麗丽 麥麦 黃黄 黨党 銀银 鐵铁 鐘钟 鏡镜 鋼钢 錯错 鍵键
    鎖锁 陽阳 陰阴 陳陈 陸陆 隊队 階阶 際际 險险 隨随 運运 達达 遠远 連连 選选 邊边 遊游 適适 遲迟 遺遗
    郵邮 鄉乡 鄰邻 醫医 醬酱 釋释 針针 輕轻 載载 較较 輛辆 輪轮 輸输 轉转 農农 軍军 軟软 貴贵 費费 資资
    賽赛 質质 貨货 責责 財财 敗败 貓猫 貧贫 購购 趙赵 趕赶 跡迹 義义 習习 聖圣 聞闻 聲声 聽听 職职 聯联
    腦脑 腳脚 臉脸 與与 興兴 舉举 舊旧 藝艺 藥药 蘇苏 機机 處处 號号 蟲虫 術术 衛卫 補补 裝装 製制 複复
    紅红 約约 級级 純纯 紙纸 細细 終终 組组 結结 給给 絕绝 統统 絲丝 維维 網网 綠绿 線线 練练 緊紧 繼继
    續续 織织 罷罢 羅罗 當当 畫画 異异 療疗 眾众 礎础 碼码 禮礼 稱称 積积 穩稳 漢汉 華华 愛爱 樂乐 萬万
"""
_SIMPLIFY = str.maketrans(dict(map(tuple, _TRADITIONAL_SIMPLIFIED.split())))


def clean(text: str, *, form: Literal["NFC", "NFKC"] = "NFKC", layout: Literal["prose", "code"] = "prose",
          simplified_chinese: bool = False) -> str:
    """The text with one spelling for what looks the same.

    `form` NFC only joins letters with their accents; NFKC also replaces look-alikes (Ｗｉｄｅ, ﬁ, ①).
    `layout` "code" keeps indentation and inner runs of spaces, which mean something there.
    Raises: ValueError for another form or layout.
    """
    if form not in ("NFC", "NFKC"):
        raise ValueError(f"form = {form!r}: NFC and NFKC are the two that clean() knows.")
    if layout not in ("prose", "code"):
        raise ValueError(f"layout = {layout!r}: must be 'prose' or 'code'.")
    text = remove_controls(unify_line_ends(repair_surrogates(text)))
    text = unicodedata.normalize(form, text)  # after the controls went: an accent may now follow its letter
    text = tidy_spaces(text, layout)          # after NFKC, which makes spaces out of other characters
    return simplify_chinese(text) if simplified_chinese else text


def repair_surrogates(text: str) -> str:
    """The text as UTF-8 can hold it: two halves of a surrogate pair are joined, a lone half becomes U+FFFD.

    Python strings may hold halves, from JSON escapes or from UTF-16 that was cut. tiktoken does the same.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def unify_line_ends(text: str) -> str:
    r"""Every line end as \n: Windows' \r\n, a lone \r, vertical tab, form feed, and Unicode's separators."""
    return _LINE_ENDS.sub("\n", text)


def remove_controls(text: str) -> str:
    """Without control characters (tab and line end stay), nor invisible characters that mean nothing."""
    return _CONTROLS.sub("", text)


def tidy_spaces(text: str, layout: Literal["prose", "code"] = "prose") -> str:
    """Plain spaces only, none at a line's end, at most one empty line in a row, none around the text.

    In prose, indentation goes too, and a run of spaces or tabs becomes one space.
    """
    text = _SPACES_AT_LINE_END.sub("", _OTHER_SPACES.sub(" ", text))
    if layout == "prose":
        text = _SPACE_RUN.sub(" ", _INDENTS.sub("\n", text)).lstrip(" ")
    return re.sub("\n{3,}", "\n\n", text).strip("\n")


def simplify_chinese(text: str) -> str:
    """Traditional characters as simplified ones, for those of our own example table."""
    return text.translate(_SIMPLIFY)

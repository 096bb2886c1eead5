//! English prose out of Rust sources and Markdown: the paragraphs of doc comments and of Markdown files, without
//! code, tables, headings, links' targets and other markup.
//!
//! The rules are simple and depend on nothing but the bytes given, so that the same files give the same text
//! everywhere. Changing one changes the demo corpus: its list of checksums must then be written again.

/// Words that English prose is full of and code is not.
const COMMON_WORDS: [&str; 40] = [
    "the", "a", "an", "of", "to", "and", "in", "is", "that", "for", "this", "it", "be", "as", "with", "are",
    "on", "or", "not", "if", "by", "from", "which", "will", "can", "at", "has", "have", "when", "but", "was",
    "may", "should", "you", "we", "its", "than", "then", "any", "all",
];
/// What legal boilerplate speaks of; it is the same in every crate.
const LEGAL_WORDS: [&str; 4] = ["license", "licence", "copyright", "warrant"];
/// Longer lines are no prose, and cost time that grows with their square.
const MAX_LINE_BYTES: usize = 8 << 10;
/// Brackets are resolved to this depth.
const MAX_DEPTH: usize = 8;
/// Tags that are dropped from within a line; other `<...>` may be a generic type.
const TAGS: [&str; 26] = [
    "a", "b", "i", "p", "br", "em", "strong", "code", "sub", "sup", "div", "span", "img", "kbd", "details",
    "summary", "h1", "h2", "h3", "ul", "ol", "li", "small", "center", "picture", "tt",
];

/// The doc comments of a Rust source, each as the Markdown that it holds.
pub fn doc_comments(source: &str) -> Vec<String> {
    let mut comments = Vec::new();
    let mut current = String::new();
    let mut in_block = false;
    for line in source.lines() {
        let line = line.trim();
        let text = if in_block {
            let (text, end) = match line.split_once("*/") {
                Some((text, _)) => (text, true),
                None => (line, false),
            };
            in_block = !end;
            Some(text.strip_prefix("* ").or(text.strip_prefix('*')).unwrap_or(text))
        } else if let Some(text) = line.strip_prefix("//!") {
            Some(text)
        } else if line.starts_with("///") && !line.starts_with("////") {
            Some(&line[3..])
        } else if (line.starts_with("/**") && !line.starts_with("/***") && !line.starts_with("/**/"))
            || line.starts_with("/*!")
        {
            let text = &line[3..];
            in_block = !text.contains("*/");
            Some(text.split("*/").next().unwrap_or_default())
        } else {
            None
        };
        match text {
            Some(text) => {
                current.push_str(text.strip_prefix(' ').unwrap_or(text));
                current.push('\n');
            }
            None if !current.is_empty() => comments.push(std::mem::take(&mut current)),
            None => {}
        }
    }
    if !current.is_empty() {
        comments.push(current);
    }
    comments
}

/// The paragraphs of a Markdown text that are English prose. A paragraph is one line; a list is one line an item.
pub fn paragraphs(markdown: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines: Vec<String> = Vec::new();
    let mut fence: Option<String> = None;
    let mut in_comment = false;
    let mut flush = |lines: &mut Vec<String>| {
        if lines.iter().any(|line| line.len() > MAX_LINE_BYTES) {
            lines.clear();
        }
        let cleaned: Vec<String> = lines.drain(..).map(|line| inline(&line)).collect();
        let paragraph = cleaned.join("\n");
        if is_prose(&paragraph) {
            found.push(paragraph);
        }
    };
    for raw in markdown.lines() {
        let line = raw.trim_end().replace('\t', "    ");
        let indent = line.len() - line.trim_start().len();
        let mut text = line.trim_start();
        if let Some(open) = &fence {
            if text.starts_with(open.as_str()) {
                fence = None;
            }
            continue;
        }
        if in_comment {
            in_comment = !text.contains("-->");
            continue;
        }
        if text.starts_with("```") || text.starts_with("~~~") {
            flush(&mut lines);
            fence = Some(text[..3].to_string());
            continue;
        }
        if text.starts_with("<!--") {
            in_comment = !text.contains("-->");
            continue;
        }
        while let Some(rest) = text.strip_prefix('>') {
            text = rest.trim_start();
        }
        let indented_code = indent >= 4 && lines.is_empty();
        let skipped = indented_code || text.starts_with('|') || text.starts_with("[!") || is_definition(text);
        if text.is_empty() || text.starts_with('#') {
            flush(&mut lines);
        } else if is_rule(text) {
            // The line above an underline is a heading.
            lines.clear();
        } else if !skipped && !is_tag_line(text) {
            match (list_item(text), lines.last_mut()) {
                (Some(item), _) => lines.push(item),
                (None, Some(last)) => {
                    last.push(' ');
                    last.push_str(text);
                }
                (None, None) => lines.push(text.to_string()),
            }
        }
    }
    flush(&mut lines);
    found
}

/// `[label]: target`
fn is_definition(text: &str) -> bool {
    text.starts_with('[') && text.contains("]:")
}

/// A line of dashes, equals signs, asterisks or underscores alone.
fn is_rule(text: &str) -> bool {
    text.len() >= 3
        && ["-", "=", "*", "_"].iter().any(|mark| text.replace(' ', "").chars().all(|c| mark.contains(c)))
}

/// A line that begins with an HTML tag or an automatic link.
fn is_tag_line(text: &str) -> bool {
    text.starts_with('<') && text[1..].starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '!')
}

/// The line of a list item, its mark made uniform.
fn list_item(text: &str) -> Option<String> {
    for mark in ["* ", "- ", "+ "] {
        if let Some(rest) = text.strip_prefix(mark) {
            return Some(format!("- {}", rest.trim_start()));
        }
    }
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    if !(1..=2).contains(&digits) {
        return None;
    }
    let rest = text[digits..].strip_prefix(". ").or(text[digits..].strip_prefix(") "))?;
    Some(format!("{}. {}", &text[..digits], rest.trim_start()))
}

/// A line without the markup inside it; runs of spaces become one.
fn inline(line: &str) -> String {
    let chars: Vec<char> = line.chars().collect();
    let mut out = String::with_capacity(line.len());
    clean(&chars, 0, &mut out);
    let out = out.replace("&nbsp;", " ").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn clean(chars: &[char], depth: usize, out: &mut String) {
    let mut at = 0;
    while at < chars.len() {
        let c = chars[at];
        let next = chars.get(at + 1).copied();
        match c {
            '`' => at = code_span(chars, at, out),
            '\\' if next.is_some_and(|next| next.is_ascii_punctuation()) => {
                out.extend(next);
                at += 2;
            }
            '!' if next == Some('[') => match closing(chars, at + 1, '[', ']') {
                Some(end) => at = target_end(chars, end + 1),
                None => at += 1,
            },
            '[' if depth < MAX_DEPTH => match closing(chars, at, '[', ']') {
                Some(end) => {
                    clean(&chars[at + 1..end], depth + 1, out);
                    at = target_end(chars, end + 1);
                }
                None => at += 1,
            },
            '<' => match tag_end(chars, at) {
                Some(end) => at = end,
                None => {
                    out.push(c);
                    at += 1;
                }
            },
            '*' | '_' if is_emphasis(chars, at) => at += 1,
            _ => {
                out.push(c);
                at += 1;
            }
        }
    }
}

/// Copies a code span as it is; returns where the text goes on.
fn code_span(chars: &[char], at: usize, out: &mut String) -> usize {
    let ticks = |from: usize| chars[from..].iter().take_while(|c| **c == '`').count();
    let open = ticks(at);
    let mut end = at + open;
    while end < chars.len() {
        let close = ticks(end);
        if close == open {
            let body: String = chars[at + open..end].iter().collect();
            out.push('`');
            out.push_str(body.trim());
            out.push('`');
            return end + close;
        }
        end += close.max(1);
    }
    at + open
}

/// The place of the bracket that closes the one at `at`.
fn closing(chars: &[char], at: usize, open: char, close: char) -> Option<usize> {
    let mut depth = 0;
    for (place, c) in chars.iter().enumerate().skip(at) {
        if *c == open {
            depth += 1;
        } else if *c == close {
            depth -= 1;
            if depth == 0 {
                return Some(place);
            }
        }
    }
    None
}

/// Where the text goes on behind a link's `(target)` or `[label]`, if it has one.
fn target_end(chars: &[char], at: usize) -> usize {
    let end = match chars.get(at) {
        Some('(') => closing(chars, at, '(', ')'),
        Some('[') => closing(chars, at, '[', ']'),
        _ => None,
    };
    end.map_or(at, |end| end + 1)
}

/// Where the text goes on behind an HTML tag or an automatic link.
fn tag_end(chars: &[char], at: usize) -> Option<usize> {
    let end = at + chars[at..].iter().position(|c| *c == '>')?;
    let body: String = chars[at + 1..end].iter().collect();
    let body = body.trim_start_matches('/');
    let name: String = body.chars().take_while(char::is_ascii_alphanumeric).collect();
    (body.contains("://") || TAGS.contains(&name.to_ascii_lowercase().as_str())).then_some(end + 1)
}

/// Whether the `*` or `_` at `at` opens or closes emphasis: its run has a word on one side only.
fn is_emphasis(chars: &[char], at: usize) -> bool {
    let other = |c: &&char| **c != chars[at];
    let before = chars[..at].iter().rev().find(other).copied().unwrap_or(' ');
    let after = chars[at..].iter().find(other).copied().unwrap_or(' ');
    let opens = !before.is_alphanumeric() && !after.is_whitespace();
    let closes = !before.is_whitespace() && !after.is_alphanumeric();
    opens != closes
}

/// Whether a cleaned paragraph is English prose: long enough, mostly letters, with the words that prose has.
fn is_prose(text: &str) -> bool {
    let words: Vec<String> = text
        .split(|c: char| !c.is_alphabetic() && c != '\'')
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    if text.len() < 48 || words.len() < 8 || text.contains("://") {
        return false;
    }
    let all = text.chars().count();
    let plain =
        text.chars().filter(|c| c.is_ascii_alphabetic() || matches!(c, ' ' | ',' | '.' | '\n')).count();
    let ascii = text.chars().filter(char::is_ascii).count();
    let control = text.chars().any(|c| c.is_control() && c != '\n');
    let common = words.iter().filter(|word| COMMON_WORDS.contains(&word.as_str())).count();
    let legal = words.iter().any(|word| LEGAL_WORDS.iter().any(|legal| word.starts_with(legal)));
    !control && !legal && plain * 100 >= all * 88 && ascii * 100 >= all * 98 && common * 5 >= words.len()
}

/// What two paragraphs that say the same have in common: the letters outside code spans, in lower case. Paragraphs
/// that differ only in a type's name or in a number are one template, filled in.
pub fn fingerprint(paragraph: &str) -> String {
    let outside = paragraph.split('`').step_by(2);
    outside.flat_map(str::chars).filter(|c| c.is_alphabetic()).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doc_comments_are_taken_and_code_is_not() {
        let source = "//! Crate text.\n//! More.\nfn a() {}\n    /// Item text.\n    ///\n    /// * one\n//// no\n\
                      // no\n/** Block\n * text */\nlet x = 1; /// no\n/* no */ /*** no */\n/*! inner */\n";
        let comments = doc_comments(source);
        let expected = ["Crate text.\nMore.\n", "Item text.\n\n* one\n", "Block\ntext \n", "inner \n"];
        assert_eq!(comments, expected);
    }

    #[test]
    fn markdown_becomes_lines_of_prose() {
        let markdown = "# Heading of the text that is not a part of it\n\
            This is the *first* paragraph of the **text**, with [a link](https://x.y/z_(w)) and\n\
            [`Vec::new`][new] in it, <b>bold</b>, snake_case and an escaped \\_ mark. ![badge](b.svg)\n\n\
            ```rust\nlet x = the_code_that_is_not_a_part_of_the_text();\n```\n\n\
            * The first item of the list is on\n  two lines of the source.\n* The second item.\n\n\
            Heading of the text that is underlined\n======\n\n    indented code is not a part of the text\n\n\
            | a | table that is not a part of the text |\n[new]: https://example.com/the_definition_of_it\n\n\
            See https://example.com/ for more of this text that is not taken.\n\n\
            This is a part that falls under the license of the text.\n\nToo short to be in it.\n\n\
            > A quoted paragraph is a part of the text as any other is.\n";
        let expected = [
            "This is the first paragraph of the text, with a link and `Vec::new` in it, bold, snake_case and an \
             escaped _ mark.",
            "- The first item of the list is on two lines of the source.\n- The second item.",
            "A quoted paragraph is a part of the text as any other is.",
        ];
        assert_eq!(paragraphs(markdown), expected);
    }

    #[test]
    fn odd_markup_ends_and_loses_nothing_else() {
        for text in
            ["`", "``a`", "[", "![", "[a](", "<", "<b", "\\", "*", "a ** b", "[[a]", "\u{fffd}`\u{e9}"]
        {
            let _ = inline(text);
        }
        let deep = format!("{}x{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(paragraphs(&deep).is_empty());
        assert_eq!(inline(&format!("{}x{}", "[".repeat(9), "]".repeat(9))), "[x]");
        assert_eq!(
            inline("2 * 3 and a_b_c and Vec<T> and `**x** [y]`"),
            "2 * 3 and a_b_c and Vec<T> and `**x** [y]`"
        );
        assert_eq!(inline("_word_ (*word*) __word__."), "word (word) word.");
    }

    #[test]
    fn a_template_has_one_fingerprint() {
        let a = fingerprint("Makes a new `Foo` of 32 bits.");
        assert_eq!(a, "makesanewofbits");
        assert_eq!(a, fingerprint("Makes a new `Bar<T>` of 64 bits."));
    }
}

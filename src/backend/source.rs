//! The text of a kernel file, compiled into the binary, with its includes pasted in.
//!
//! At run time no folder of ours exists that a shader or CUDA compiler could read, so a line
//! `#include "common/x"` (in WGSL, which has no includes, `//#include "common/x"`) is replaced by that file's text.

use sha2::{Digest, Sha256};
use std::sync::OnceLock;

/// Every file that kernels may include: the name as written in the include, and its text.
const COMMON: &[(&str, &str)] = &[
    ("common/row_sum.wgsl", include_str!("../../wgsl/common/row_sum.wgsl")),
    ("common/row.cuh", include_str!("../../cuda/common/row.cuh")),
    ("common/word.cuh", include_str!("../../cuda/common/word.cuh")),
    ("common/element.cuh", include_str!("../../cuda/common/element.cuh")),
    ("common/pack.cuh", include_str!("../../cuda/common/pack.cuh")),
    ("common/hopper.cuh", include_str!("../../cuda/common/hopper.cuh")),
    ("common/attention_seen.cuh", include_str!("../../cuda/common/attention_seen.cuh")),
    ("common/attention.cuh", include_str!("../../cuda/common/attention.cuh")),
    ("common/attention_scores.cuh", include_str!("../../cuda/common/attention_scores.cuh")),
    ("common/attention_order.cuh", include_str!("../../cuda/common/attention_order.cuh")),
    ("common/attention_norm.cuh", include_str!("../../cuda/common/attention_norm.cuh")),
    ("common/attention_exact.cuh", include_str!("../../cuda/common/attention_exact.cuh")),
    ("common/product.cuh", include_str!("../../cuda/common/product.cuh")),
    ("common/epilogue_qk_norm.cuh", include_str!("../../cuda/common/epilogue_qk_norm.cuh")),
    ("common/gated.cuh", include_str!("../../cuda/common/gated.cuh")),
];

/// One kernel file.
#[derive(Debug)]
pub struct Source {
    name: &'static str,
    text: &'static str,
    expanded: OnceLock<(String, u128)>,
}

impl Source {
    /// The file `name` (for messages) with the given text.
    pub const fn new(name: &'static str, text: &'static str) -> Self {
        Self { name, text, expanded: OnceLock::new() }
    }

    /// The file's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    fn expanded(&self) -> &(String, u128) {
        self.expanded.get_or_init(|| {
            let text = paste_includes(self.text);
            let hash = Sha256::digest(&text);
            let (head, _) = hash.split_at(16);
            let hash = head.iter().fold(0, |hash, byte| hash << 8 | u128::from(*byte));
            (text, hash)
        })
    }

    /// The text with its includes pasted in.
    pub fn text(&self) -> &str {
        &self.expanded().0
    }

    /// The constants of the forms that the compile check (`.ci/cuda`) tries, one line each.
    #[cfg(test)]
    pub(super) fn variants(&self) -> impl Iterator<Item = &str> {
        self.text().lines().filter_map(|line| line.strip_prefix("// variant: "))
    }

    /// The text without the CUDA kernels other than `entry`, which would be compiled with it and thrown away: each begins
    /// with a line `extern "C" __global__ ...` and ends with a line `}`. Lines keep their numbers. All of the text where
    /// none of them is the entry (a macro makes it).
    pub fn text_of(&self, entry: &str) -> String {
        let mut text = String::new();
        let mut found = false;
        let mut kernel: Option<String> = None;
        for line in self.text().lines() {
            if line.starts_with("extern \"C\" __global__") {
                kernel = Some(String::new());
            }
            let Some(body) = &mut kernel else {
                text.push_str(line);
                text.push('\n');
                continue;
            };
            body.push_str(line);
            body.push('\n');
            if line == "}" {
                let named = format!("{entry}(");
                let is_it = body.split_whitespace().any(|word| word.starts_with(&named));
                found |= is_it;
                match is_it {
                    true => text.push_str(body),
                    false => text.extend(body.lines().map(|_| '\n')),
                }
                kernel = None;
            }
        }
        if found { text } else { self.text().to_string() }
    }

    /// A hash of [`Self::text`]: part of the identity of every kernel compiled from it.
    pub fn hash(&self) -> u128 {
        self.expanded().1
    }
}

fn paste_includes(text: &str) -> String {
    let mut pasted = String::with_capacity(text.len());
    for line in text.lines() {
        match included(line) {
            Some(common) => pasted.push_str(&paste_includes(common)),
            None => pasted.push_str(line),
        }
        pasted.push('\n');
    }
    pasted
}

/// The text that an include line stands for; `None` for other lines and for the compiler's own headers.
fn included(line: &str) -> Option<&'static str> {
    let line = line.trim();
    let line = line.strip_prefix("//").unwrap_or(line);
    let name = line.strip_prefix("#include \"")?.strip_suffix('"')?;
    COMMON.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn includes_of_ours_are_pasted_and_headers_stay() {
        let source = Source::new("x.cu", "#include <cuda_bf16.h>\n#include \"common/row.cuh\"\nend\n");
        assert!(source.text().starts_with("#include <cuda_bf16.h>\n"));
        assert!(source.text().contains(COMMON[1].1.lines().last().unwrap()));
        assert!(source.text().ends_with("\nend\n"));
        assert!(!source.text().contains("#include \"common"));
    }

    #[test]
    fn a_kernel_is_compiled_without_the_others() {
        let kernel = |name: &str| {
            format!(
                "extern \"C\" __global__ void __launch_bounds__(1)\n{name}(int *x) {{\n    if (x) {{\n    }}\n}}\n"
            )
        };
        let text = format!("// head\n{}static int a;\n{}", kernel("add"), kernel("add_all"));
        let source = Source::new("x.cu", Box::leak(text.clone().into_boxed_str()));
        let blank = "\n".repeat(5);
        assert_eq!(source.text_of("add"), format!("// head\n{}static int a;\n{blank}", kernel("add")));
        assert_eq!(
            source.text_of("add_all"),
            format!("// head\n{blank}static int a;\n{}", kernel("add_all"))
        );
        assert_eq!(source.text_of("made_by_a_macro"), text);
    }

    #[test]
    fn the_hash_is_of_the_pasted_text() {
        let (a, b) = (Source::new("a", "//#include \"common/row_sum.wgsl\"\n"), Source::new("b", ""));
        let c = Source::new("c", Box::leak(a.text().to_string().into_boxed_str()));
        assert_ne!(a.hash(), b.hash());
        assert_eq!(a.text().trim_end(), c.text().trim_end());
        assert_eq!(b.hash() >> 64, 0xe3b0_c442_98fc_1c14);
    }
}

//! The score of a model that knows only how often each token occurs: what any trained model must beat.

use crate::data::byte_table::{ByteTable, bits_per_byte};

/// Bits per byte of `val`'s targets under add-one counts of `train`'s tokens.
pub fn unigram_bpb(train: &[u16], val: &[u16], table: &ByteTable) -> f64 {
    let vocab = table.base_bytes.len();
    let mut counts = vec![1u64; vocab];
    for token in train {
        counts[usize::from(*token)] += 1;
    }
    let total: u64 = counts.iter().sum();
    let nll = val.iter().skip(1).map(|token| (total as f64 / counts[usize::from(*token)] as f64).ln());
    bits_per_byte(nll.sum(), table.count(val))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::Tokenizer;

    #[test]
    fn two_equally_frequent_bytes_cost_near_one_bit_each() {
        let table = ByteTable::new(&Tokenizer::byte(), 260).unwrap();
        let text: Vec<u16> = (0..200_000u32).map(|i| if i % 2 == 0 { 101 } else { 102 }).collect();
        let bpb = unigram_bpb(&text, &text, &table);
        // 260 add-one counts among 200,000 tokens cost under 0.002 bits.
        assert!((bpb - 1.0).abs() < 0.002, "{bpb}");
    }
}

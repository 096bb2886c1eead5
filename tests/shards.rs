//! Shards, the training stream and the validation tokens, against a plain re-statement of the challenge's rules; and
//! every way in which a shard can be bad.

use fairway::data::folder::{DataFolder, Split};
use fairway::data::shard::{HEADER_BYTES, MAGIC, Shard, ShardWriter};
use fairway::data::stream::StreamPosition;
use fairway::data::tokenizer::Tokenizer;
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};

/// A shard's bytes with that header.
fn shard_bytes(header: [i32; 3], tokens: &[u16]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    for (word, place) in header.iter().zip(bytes.chunks_exact_mut(4)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    bytes
}

fn write_shard(dir: &Path, split: Split, index: usize, tokens: &[u16]) -> PathBuf {
    let path = dir.join(split.shard_name(index));
    let mut writer = ShardWriter::create(&path).unwrap();
    writer.push(tokens).unwrap();
    assert_eq!(writer.finish().unwrap(), tokens.len() as u64);
    path
}

/// A folder with these train shards.
fn folder(shards: &[Vec<u16>]) -> (tempfile::TempDir, DataFolder) {
    let dir = tempfile::tempdir().unwrap();
    for (index, tokens) in shards.iter().enumerate() {
        write_shard(dir.path(), Split::Train, index, tokens);
    }
    let folder = DataFolder::open(dir.path()).unwrap();
    (dir, folder)
}

#[test]
fn a_bad_shard_is_one_line_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let good = shard_bytes([MAGIC, 1, 3], &[1, 2, 3]);
    let longer = [good.clone(), vec![0]].concat();
    let cases: [(&str, &[u8], &str); 10] = [
        ("empty.bin", b"", "shard of 0 bytes"),
        ("header.bin", &good[..HEADER_BYTES], "shard of 1024 bytes"),
        ("cut.bin", &good[..good.len() - 1], "shard of 1029 bytes whose header counts 3 tokens"),
        ("long.bin", &longer, "shard of 1031 bytes whose header counts 3 tokens"),
        ("magic.bin", &shard_bytes([MAGIC + 1, 1, 3], &[1, 2, 3]), "magic number 20240521"),
        ("version.bin", &shard_bytes([MAGIC, 2, 3], &[1, 2, 3]), "shard version 2"),
        ("none.bin", &shard_bytes([MAGIC, 1, 0], &[1]), "header counts 0 tokens"),
        ("negative.bin", &shard_bytes([MAGIC, 1, -3], &[1, 2, 3]), "header counts -3 tokens"),
        (
            "huge.bin",
            &shard_bytes([MAGIC, 1, i32::MAX], &[1]),
            "shard of 1026 bytes whose header counts 2147483647",
        ),
        ("text.bin", &[b'x'; 2000], "magic number 2021161080"),
    ];
    for (name, bytes, message) in cases {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = Shard::open(&path).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{name}");
        let line = error.to_string();
        assert!(line.starts_with(message) && line.contains(name) && !line.contains('\n'), "{line}");
    }
    assert!(Shard::open(dir.path()).unwrap_err().to_string().contains(&*dir.path().to_string_lossy()));
    let missing = Shard::open(&dir.path().join("missing.bin")).unwrap_err();
    assert!(missing.exit_code() == 2 && missing.to_string().contains("missing.bin"));
}

#[test]
fn bad_folders_are_one_line_that_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let absent = DataFolder::open(&dir.path().join("absent")).unwrap_err();
    assert!(absent.exit_code() == 2 && absent.to_string().contains("absent"), "{absent}");
    let empty = DataFolder::open(dir.path()).unwrap_err();
    assert!(empty.exit_code() == 2 && empty.to_string().starts_with("no shards"), "{empty}");

    write_shard(dir.path(), Split::Val, 0, &[1, 2, 3, 4]);
    let folder = DataFolder::open(dir.path()).unwrap();
    assert!(folder.train(1024).unwrap_err().to_string().starts_with("no train shards"));
    let short = folder.val(4, 1024).unwrap_err();
    assert!(short.exit_code() == 2 && short.to_string().contains("fineweb_val_000000.bin"), "{short}");
    assert!(short.to_string().starts_with("validation split of 4 tokens"), "{short}");
    assert!(folder.val(0, 1024).is_err() && folder.val(usize::MAX, 1024).is_err());
    assert_eq!(folder.val(3, 1024).unwrap().sequences(), 1);
    let vocab = folder.val(3, 4).unwrap_err();
    assert!(vocab.to_string().starts_with("token id 4 at token 3"), "{vocab}");

    for (text, message) in [("{", "bad record"), ("[]", "bad record"), ("{\"format\":1}", "bad record")] {
        fs::write(dir.path().join("fairway_data.json"), text).unwrap();
        let error = DataFolder::open(dir.path()).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().starts_with(message), "{error}");
        assert!(error.to_string().contains("fairway_data.json"), "{error}");
    }
}

#[test]
fn only_the_splits_own_files_are_taken_in_the_order_of_their_names() {
    let dir = tempfile::tempdir().unwrap();
    for index in [10, 2, 0] {
        write_shard(dir.path(), Split::Train, index, &[1, index as u16]);
    }
    for name in ["fineweb_train_000001.bin.partial-7", "fineweb_trainer.txt", "readme.md", "train_000003.bin"]
    {
        fs::write(dir.path().join(name), b"not a shard").unwrap();
    }
    let folder = DataFolder::open(dir.path()).unwrap();
    assert!(folder.shards(Split::Val).is_empty() && folder.info().is_none());
    // Nothing is recorded: any tokenizer is taken.
    folder.check_tokenizer(&Tokenizer::byte()).unwrap();
    let mut stream = folder.train(1024).unwrap();
    assert_eq!((stream.shards(), stream.tokens()), (3, 6));
    assert_eq!(stream.next_batch(5, 0, 1).unwrap().0, [1, 0, 1, 2, 1]);
}

#[test]
fn batches_follow_the_challenges_stream() {
    // Tokens 0..20 in shards of 7, 1 and 12.
    let all: Vec<u16> = (0..20).collect();
    let (_dir, folder) = folder(&[all[..7].to_vec(), all[7..8].to_vec(), all[8..].to_vec()]);
    let mut ranks = [folder.train(20).unwrap(), folder.train(20).unwrap()];
    // 2 ranks of 4 tokens: 10 tokens a call.
    let x = |ranks: &mut [fairway::data::stream::TokenStream; 2], rank: usize| {
        ranks[rank].next_batch(4, rank, 2).unwrap()
    };
    assert_eq!(x(&mut ranks, 0), (vec![0, 1, 2, 3], vec![1, 2, 3, 4]));
    assert_eq!(x(&mut ranks, 1), (vec![5, 6, 7, 8], vec![6, 7, 8, 9]));
    assert_eq!(x(&mut ranks, 0), (vec![10, 11, 12, 13], vec![11, 12, 13, 14]));
    assert_eq!(x(&mut ranks, 1), (vec![15, 16, 17, 18], vec![16, 17, 18, 19]));
    assert_eq!(ranks[0].position(), ranks[1].position());
    assert_eq!(ranks[0].position(), StreamPosition { shard: 0, offset: 0 });
    // A span longer than the whole stream goes round it.
    let (long, next) = ranks[0].next_batch(44, 0, 1).unwrap();
    assert_eq!(long, (0..44).map(|index| index % 20).collect::<Vec<u16>>());
    assert_eq!(next[..], (1..45).map(|index| index % 20).collect::<Vec<u16>>());
    assert_eq!(ranks[0].position(), StreamPosition { shard: 0, offset: 5 });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any shards, batch and world size: each rank's batch is the span of the endless sequence that the rule
    /// names, and a stream put back to a saved position goes on with the same batches.
    #[test]
    fn every_rank_reads_its_span(
        sizes in prop::collection::vec(1_usize..40, 1..5),
        calls in prop::collection::vec((1_usize..50, 1_usize..5), 1..6),
    ) {
        let total: usize = sizes.iter().sum();
        let token = |index: usize| ((index % total) * 7 % 1021) as u16;
        let mut start = 0;
        let shards: Vec<Vec<u16>> = sizes
            .iter()
            .map(|size| {
                start += size;
                (start - size..start).map(token).collect()
            })
            .collect();
        let (_dir, folder) = folder(&shards);
        let mut stream = folder.train(1021).unwrap();
        let mut at = 0;
        for (local, world) in calls {
            let saved = stream.position();
            let json = serde_json::to_string(&saved).unwrap();
            for rank in 0..world {
                stream.seek(serde_json::from_str(&json).unwrap()).unwrap();
                let (x, y) = stream.next_batch(local, rank, world).unwrap();
                let first = at + rank * (local + 1);
                prop_assert_eq!(x, (first..first + local).map(token).collect::<Vec<_>>());
                prop_assert_eq!(y, (first + 1..first + 1 + local).map(token).collect::<Vec<_>>());
            }
            at += (local + 1) * world;
        }
    }

    /// Whatever the bytes of a shard, opening it is a result and not a crash, and what opens has the size it says.
    #[test]
    fn no_bytes_crash_the_reader(header in any::<[i32; 3]>(), count in 0_usize..20, right in any::<bool>()) {
        let header = if right { [MAGIC, 1, header[2] % 20] } else { header };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        fs::write(&path, shard_bytes(header, &vec![7; count])).unwrap();
        let opened = Shard::open(&path);
        prop_assert_eq!(opened.is_ok(), right && count > 0 && header[2] == count as i32);
        if let Ok(shard) = opened {
            prop_assert_eq!(shard.tokens(), &vec![7; count][..]);
        }
    }
}

#[test]
fn bad_requests_leave_the_stream_where_it_was() {
    let (dir, folder) = folder(&[vec![1, 2, 3], vec![4, 5, 600]]);
    let mut stream = folder.train(600).unwrap();
    let start = stream.position();
    assert!(stream.next_batch(0, 0, 1).is_err() && stream.next_batch(1, 1, 1).is_err());
    let memory = stream.next_batch(usize::MAX - 1, 0, 1).unwrap_err();
    assert_eq!(memory.exit_code(), 1, "{memory}");
    // The second shard's ids are checked when it is reached.
    let vocab = stream.next_batch(3, 0, 1).unwrap_err();
    assert!(vocab.to_string().starts_with("token id 600 at token 2"), "{vocab}");
    assert!(vocab.to_string().contains("fineweb_train_000001.bin"), "{vocab}");
    assert_eq!(stream.position(), start);
    assert_eq!(stream.next_batch(2, 0, 1).unwrap(), (vec![1, 2], vec![2, 3]));
    for position in [StreamPosition { shard: 2, offset: 0 }, StreamPosition { shard: 0, offset: 3 }] {
        assert_eq!(stream.seek(position).unwrap_err().exit_code(), 2);
    }
    // A shard that is bad is found when the stream is opened, not in the middle of a run.
    fs::write(dir.path().join("fineweb_train_000001.bin"), shard_bytes([MAGIC, 1, 9], &[1])).unwrap();
    let cut = DataFolder::open(dir.path()).unwrap().train(600).unwrap_err();
    assert!(cut.to_string().contains("fineweb_train_000001.bin"), "{cut}");
}

#[test]
fn validation_is_cut_to_whole_sequences_and_shared_out() {
    let all: Vec<u16> = (0..47).collect();
    for shards in [vec![all.clone()], vec![all[..20].to_vec(), all[20..21].to_vec(), all[21..].to_vec()]] {
        let dir = tempfile::tempdir().unwrap();
        for (index, tokens) in shards.iter().enumerate() {
            write_shard(dir.path(), Split::Val, index, tokens);
        }
        let folder = DataFolder::open(dir.path()).unwrap();
        // floor(46 / 8) * 8 + 1 = 41.
        let val = folder.val(8, 1024).unwrap();
        assert_eq!((val.sequences(), val.seq_len()), (5, 8));
        assert_eq!(val.tokens(), &all[..41]);
        assert_eq!(val.batch(1..3), (&all[8..24], &all[9..25]));
        assert_eq!(val.batch(4..9), (&all[32..40], &all[33..41]));
        assert_eq!(val.batch(9..10), (&all[..0], &all[..0]));
        // floor(5 * r / 3): 0, 1, 3, 5.
        let parts: Vec<_> = (0..3).map(|rank| val.partition(rank, 3)).collect();
        assert_eq!(parts, [0..1, 1..3, 3..5]);
        assert_eq!(val.partition(0, 1), 0..5);
    }
}

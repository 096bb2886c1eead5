//! Compressors of an artifact's sections, and one streaming decoder over all of them that no input can make grow.
//!
//! Every stream is raw: no container of the codec's own beyond what it cannot do without. A section is cut into blocks of
//! [`BLOCK_BYTES`], the last one shorter, each a stream of its own right behind the one before: blocks are compressed in
//! parallel, and what comes out does not depend on the threads. A [`SectionReader`] gives at most the bytes asked for, and
//! refuses blocks that are longer or shorter than that; [`SectionReader::finish`] refuses input that is left behind. The
//! decoders' own memory is bounded by their windows: brotli 16 MiB, lzma [`LZMA_DICT_MAX`], zstd
//! 2^[`ZSTD_WINDOW_LOG`] bytes, zlib 32 KiB.

use crate::error::{Error, Result};
use brotli::{BrotliDecompressStream, BrotliResult, BrotliState, HeapAlloc, HuffmanCode};
use flate2::{Decompress, FlushDecompress};
use liblzma::stream::{Action, Filters, LzmaOptions, PRESET_EXTREME};
use rayon::prelude::*;
use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::str::FromStr;
use zstd::stream::raw::{CParameter, DParameter, Operation};

/// The largest LZMA dictionary that is written or accepted, in bytes (that of xz's preset 9).
pub const LZMA_DICT_MAX: u32 = 64 << 20;

/// The largest zstd window that is written or accepted, as a power of two (128 MiB).
pub const ZSTD_WINDOW_LOG: u32 = 27;

/// Bytes of a block before compression. Against blocks of 4 MiB, on Gaussian codes of 3 and 6 bits: brotli 0.00 to +0.03 %, in half
/// of its time even on one core, lzma -0.06 to 0.00 % as it arranges them, zstd +0.03 to +0.08 %.
pub const BLOCK_BYTES: usize = 1 << 19;

/// What `--codec` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Brotli, quality 11, a window of up to 16 MiB.
    Brotli,
    /// LZMA2 with xz's preset 9e less its contexts for text, as a raw stream.
    Lzma,
    /// The same stream written with xz's preset 9, as the PRs have it; read as [`Self::Lzma`].
    Xz9,
    /// Zstandard, level 22, a window of up to 128 MiB.
    Zstd,
    /// Zlib, level 9.
    Zlib,
}

impl Codec {
    /// The codecs there are, by the names that `--codec` takes; the default first.
    pub const ALL: [(&'static str, Self); 5] = [
        ("brotli", Self::Brotli),
        ("lzma", Self::Lzma),
        ("zstd", Self::Zstd),
        ("zlib", Self::Zlib),
        ("xz9", Self::Xz9),
    ];

    /// The codec's number in an artifact.
    pub fn id(self) -> u8 {
        match self {
            Self::Brotli => 1,
            Self::Lzma | Self::Xz9 => 2,
            Self::Zstd => 3,
            Self::Zlib => 4,
        }
    }

    /// The codec of a number in an artifact.
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.iter().map(|&(_, codec)| codec).find(|codec| codec.id() == id)
    }

    /// Compresses `raw` to one stream. The same bytes give the same stream on every machine (one thread, no timing).
    pub fn compress(self, raw: &[u8]) -> Result<Vec<u8>> {
        self.compress_pieces(raw, &[])
    }

    /// Compresses a section in blocks, in parallel; `cuts` as in `compress_pieces`.
    pub fn compress_section(self, raw: &[u8], cuts: &[usize]) -> Result<Vec<u8>> {
        let mut blocks: Vec<&[u8]> = raw.chunks(BLOCK_BYTES).collect();
        if blocks.is_empty() {
            blocks.push(&[]);
        }
        let compress = |(number, block): (usize, &&[u8])| {
            let start = number * BLOCK_BYTES;
            let cuts: Vec<usize> = cuts.iter().filter(|&&cut| cut > start).map(|cut| cut - start).collect();
            self.compress_pieces(block, &cuts)
        };
        Ok(blocks.par_iter().enumerate().map(compress).collect::<Result<Vec<_>>>()?.concat())
    }

    /// Compresses `raw` to one stream, its statistics changing at the offsets `cuts` (ascending; a hint that cannot do harm).
    ///
    /// Brotli starts new codes there: its own search for such places misses them in large inputs (1.3 to 1.8 % more bytes
    /// on Gaussian codes of several standard deviations). The other codecs adapt, or start new codes often anyway.
    fn compress_pieces(self, raw: &[u8], cuts: &[usize]) -> Result<Vec<u8>> {
        let packed = match self {
            Self::Brotli => compress_brotli(raw, cuts),
            Self::Lzma => compress_lzma(raw, false),
            Self::Xz9 => compress_lzma(raw, true),
            Self::Zstd => compress_zstd(raw),
            Self::Zlib => compress_zlib(raw),
        };
        packed.map_err(|error| {
            Error::failed(
                format!("cannot compress ({error})"),
                format!("codec {self}"),
                "memory for the encoder",
            )
        })
    }

    /// Decompresses a stream that must hold exactly `raw_len` bytes, all of `stored` and nothing else.
    ///
    /// Memory grows with what the stream really holds, never with `raw_len` alone.
    pub fn decompress(self, stored: &[u8], raw_len: u64) -> io::Result<Vec<u8>> {
        SectionReader::of_blocks(self, stored, raw_len, raw_len)?.read_all(raw_len)
    }

    /// The same for a section in blocks.
    pub fn decompress_section(self, stored: &[u8], raw_len: u64) -> io::Result<Vec<u8>> {
        SectionReader::new(self, stored, raw_len)?.read_all(raw_len)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Brotli => "brotli",
            Self::Lzma => "lzma",
            Self::Xz9 => "xz9",
            Self::Zstd => "zstd",
            Self::Zlib => "zlib",
        })
    }
}

impl FromStr for Codec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.iter().find(|(name, _)| *name == text).map(|&(_, codec)| codec).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|(name, _)| *name).collect();
            Error::input(format!("unknown codec {text:?}"), "--codec", format!("one of {}", known.join(", ")))
        })
    }
}

fn compress_brotli(raw: &[u8], cuts: &[usize]) -> io::Result<Vec<u8>> {
    let params = brotli::enc::BrotliEncoderParams {
        quality: 11,
        lgwin: window_log(raw.len(), 10, 24) as i32,
        size_hint: raw.len(),
        ..Default::default()
    };
    let mut writer = brotli::CompressorWriter::with_params(Vec::new(), 1 << 16, &params);
    let mut done = 0;
    for &cut in cuts.iter().filter(|&&cut| cut < raw.len()) {
        if let Some(piece) = raw.get(done..cut).filter(|piece| !piece.is_empty()) {
            writer.write_all(piece)?;
            writer.flush()?;
            done = cut;
        }
    }
    writer.write_all(&raw[done..])?;
    Ok(writer.into_inner())
}

/// The smallest power of two that spans `len` bytes, within the codec's limits.
fn window_log(len: usize, least: u32, most: u32) -> u32 {
    len.next_power_of_two().ilog2().clamp(least, most)
}

/// The raw LZMA2 filter for a stream of `raw_len` bytes. The stream carries its literal and position bits itself; the
/// dictionary size follows from the length, on both sides. `plain` is preset 9 as it is.
fn lzma_filters(raw_len: u64, plain: bool) -> io::Result<Filters> {
    let mut options = LzmaOptions::new_preset(if plain { 9 } else { 9 | PRESET_EXTREME })?;
    if !plain {
        // Quantised weights have no text's context and no alignment: without both, 0.08 % less. (The longer search for matches
        // takes off up to 0.14 % where codes are few.)
        options.literal_context_bits(0).position_bits(0);
    }
    let len = u32::try_from(raw_len).unwrap_or(u32::MAX).clamp(4096, LZMA_DICT_MAX);
    options.dict_size(len.next_power_of_two());
    let mut filters = Filters::new();
    filters.lzma2(&options);
    Ok(filters)
}

fn compress_lzma(raw: &[u8], plain: bool) -> io::Result<Vec<u8>> {
    let stream = liblzma::stream::Stream::new_raw_encoder(&lzma_filters(raw.len() as u64, plain)?)?;
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    encoder.write_all(raw)?;
    encoder.finish()
}

fn compress_zstd(raw: &[u8]) -> io::Result<Vec<u8>> {
    let mut compressor = zstd::bulk::Compressor::new(22)?;
    compressor.set_parameter(CParameter::WindowLog(window_log(raw.len(), 10, ZSTD_WINDOW_LOG)))?;
    compressor.compress(raw)
}

fn compress_zlib(raw: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(raw)?;
    encoder.finish()
}

type Brotli = BrotliState<HeapAlloc<u8>, HeapAlloc<u32>, HeapAlloc<HuffmanCode>>;

enum Decoder {
    Brotli(Box<Brotli>),
    Lzma(liblzma::stream::Stream),
    Zstd(zstd::stream::raw::Decoder<'static>),
    Zlib(Decompress),
}

/// What one call of a decoder did.
struct Step {
    consumed: usize,
    produced: usize,
    at_end: bool,
}

impl Decoder {
    fn new(codec: Codec, raw_len: u64) -> io::Result<Self> {
        Ok(match codec {
            // The strict state refuses windows above 16 MiB.
            Codec::Brotli => Self::Brotli(Box::new(BrotliState::new_strict(
                HeapAlloc::new(0),
                HeapAlloc::new(0),
                HeapAlloc::new(HuffmanCode::default()),
            ))),
            Codec::Lzma | Codec::Xz9 => {
                Self::Lzma(liblzma::stream::Stream::new_raw_decoder(&lzma_filters(raw_len, false)?)?)
            }
            Codec::Zstd => {
                let mut decoder = zstd::stream::raw::Decoder::new()?;
                decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG))?;
                Self::Zstd(decoder)
            }
            Codec::Zlib => Self::Zlib(Decompress::new(true)),
        })
    }

    fn step(&mut self, input: &[u8], output: &mut [u8]) -> io::Result<Step> {
        match self {
            Self::Brotli(state) => {
                let (mut left_in, mut consumed) = (input.len(), 0);
                let (mut left_out, mut produced, mut total) = (output.len(), 0, 0);
                let result = BrotliDecompressStream(
                    &mut left_in,
                    &mut consumed,
                    input,
                    &mut left_out,
                    &mut produced,
                    output,
                    &mut total,
                    state,
                );
                match result {
                    BrotliResult::ResultFailure => Err(invalid("not a brotli stream")),
                    result => {
                        Ok(Step { consumed, produced, at_end: matches!(result, BrotliResult::ResultSuccess) })
                    }
                }
            }
            Self::Lzma(stream) => {
                let (before_in, before_out) = (stream.total_in(), stream.total_out());
                let status = stream.process(input, output, Action::Run);
                let (consumed, produced) = (stream.total_in() - before_in, stream.total_out() - before_out);
                let at_end = match status {
                    Ok(liblzma::stream::Status::StreamEnd) => true,
                    Ok(_) => false,
                    Err(_) => return Err(invalid("not an lzma stream")),
                };
                Ok(Step { consumed: consumed as usize, produced: produced as usize, at_end })
            }
            Self::Zstd(decoder) => {
                let status = decoder
                    .run_on_buffers(input, output)
                    .map_err(|error| invalid(&format!("not a zstd stream of this size: {error}")))?;
                Ok(Step {
                    consumed: status.bytes_read,
                    produced: status.bytes_written,
                    at_end: status.remaining == 0,
                })
            }
            Self::Zlib(decoder) => {
                let (before_in, before_out) = (decoder.total_in(), decoder.total_out());
                let status = decoder
                    .decompress(input, output, FlushDecompress::None)
                    .map_err(|_| invalid("not a zlib stream"))?;
                Ok(Step {
                    consumed: (decoder.total_in() - before_in) as usize,
                    produced: (decoder.total_out() - before_out) as usize,
                    at_end: status == flate2::Status::StreamEnd,
                })
            }
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The error of a stream that ends before its declared length.
pub fn short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the stream holds less than its declared length")
}

/// Decodes the blocks of a section from `input`, as far as they are read.
pub struct SectionReader<R> {
    codec: Codec,
    decoder: Decoder,
    input: R,
    /// Whether the block's stream has ended.
    at_end: bool,
    /// Bytes that the block is still to give.
    block_left: u64,
    /// Bytes of the blocks behind it.
    behind: u64,
    block_bytes: u64,
}

impl<R: BufRead> SectionReader<R> {
    /// Starts a section that was declared to hold `raw_len` bytes.
    pub fn new(codec: Codec, input: R, raw_len: u64) -> io::Result<Self> {
        Self::of_blocks(codec, input, raw_len, BLOCK_BYTES as u64)
    }

    fn of_blocks(codec: Codec, input: R, raw_len: u64, block_bytes: u64) -> io::Result<Self> {
        let block_left = raw_len.min(block_bytes);
        let decoder = Decoder::new(codec, block_left)?;
        let behind = raw_len - block_left;
        Ok(Self { codec, decoder, input, at_end: false, block_left, behind, block_bytes })
    }

    /// The next `len` bytes, no fewer; the buffer grows as they come.
    pub fn read_vec(&mut self, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < len {
            let have = bytes.len();
            let chunk = (len - have as u64).min(have.max(1 << 20) as u64);
            bytes.reserve_exact(chunk as usize);
            if self.take(chunk).read_to_end(&mut bytes)? == 0 {
                return Err(short());
            }
        }
        Ok(bytes)
    }

    fn read_all(mut self, raw_len: u64) -> io::Result<Vec<u8>> {
        let raw = self.read_vec(raw_len)?;
        self.finish()?;
        Ok(raw)
    }

    /// Checks that the last block has ended just here: no byte more in it, and none behind it.
    pub fn finish(mut self) -> io::Result<()> {
        if self.read(&mut [0])? != 0 {
            return Err(too_long());
        }
        if !self.input.fill_buf()?.is_empty() {
            return Err(invalid("bytes behind the end of the stream"));
        }
        Ok(())
    }

    /// Starts the next block, or says that there is none.
    fn next_block(&mut self) -> io::Result<bool> {
        if self.block_left > 0 {
            return Err(short());
        }
        if self.behind == 0 {
            return Ok(false);
        }
        self.block_left = self.behind.min(self.block_bytes);
        self.behind -= self.block_left;
        self.decoder = Decoder::new(self.codec, self.block_left)?;
        self.at_end = false;
        Ok(true)
    }
}

fn too_long() -> io::Error {
    invalid("the stream holds more than its declared length")
}

impl<R: BufRead> Read for SectionReader<R> {
    fn read(&mut self, output: &mut [u8]) -> io::Result<usize> {
        // Where a block has given all its bytes, its stream must still end: there is no room for a byte more.
        let mut beyond = [0];
        while !output.is_empty() {
            if self.at_end && !self.next_block()? {
                return Ok(0);
            }
            let room = usize::try_from(self.block_left).unwrap_or(usize::MAX).min(output.len());
            let room = if room > 0 { &mut output[..room] } else { &mut beyond[..] };
            let input = self.input.fill_buf()?;
            let no_input = input.is_empty();
            let Step { consumed, produced, at_end } = self.decoder.step(input, room)?;
            self.input.consume(consumed);
            self.at_end = at_end;
            if produced > 0 {
                self.block_left = self.block_left.checked_sub(produced as u64).ok_or_else(too_long)?;
                return Ok(produced);
            }
            if consumed == 0 && !at_end {
                return Err(if no_input { short() } else { invalid("the stream does not go on") });
            }
        }
        Ok(0)
    }
}

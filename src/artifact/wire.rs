//! The artifact's small tables on the wire: varints, strings and byte columns, read with every length checked.

use crate::error::{Error, Result};

/// Appends an unsigned integer, seven bits a byte, lowest first.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a string's length and its bytes.
pub fn put_str(out: &mut Vec<u8>, text: &str) {
    put_varint(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

/// Appends a signed integer so that small magnitudes are short.
pub fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_varint(out, ((value << 1) ^ (value >> 63)).cast_unsigned());
}

/// Appends flags, eight a byte, lowest bit first.
pub fn put_bits(out: &mut Vec<u8>, bits: &[bool]) {
    out.extend(
        bits.chunks(8).map(|byte| byte.iter().enumerate().fold(0u8, |b, (i, &bit)| b | u8::from(bit) << i)),
    );
}

/// Reads a table's bytes front to back; no read goes past them, no count is believed before the bytes are there.
pub struct Cursor<'a> {
    rest: &'a [u8],
    table: &'static str,
    place: &'a str,
}

impl<'a> Cursor<'a> {
    /// Starts at the front of `bytes`; `table` and `place` (the file) are for the messages.
    pub fn new(bytes: &'a [u8], table: &'static str, place: &'a str) -> Self {
        Self { rest: bytes, table, place }
    }

    /// The error that this table is not what it should be.
    pub fn bad(&self, what: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
        Error::input(format!("{} of the artifact: {what}", self.table), self.place, expected)
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        match self.rest.split_at_checked(len) {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(taken)
            }
            None => Err(self.bad(format!("ends {} bytes early", len - self.rest.len()), "a complete table")),
        }
    }

    /// The bytes up to the next `end`, which is taken too.
    pub fn take_until(&mut self, end: u8) -> Result<&'a [u8]> {
        let Some(len) = self.rest.iter().position(|&byte| byte == end) else {
            return Err(self.bad("ends within a line", "a complete table"));
        };
        let taken = self.take(len)?;
        self.take(1)?;
        Ok(taken)
    }

    /// One byte.
    pub fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    /// An unsigned integer of at most `max`.
    pub fn varint(&mut self, what: &str, max: u64) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if (bits << shift) >> shift != bits {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if value > max {
                    return Err(self.bad(format!("{what} is {value}"), format!("at most {max}")));
                }
                return Ok(value);
            }
        }
        Err(self.bad(format!("{what} is not a number"), "an integer of 64 bits"))
    }

    /// A signed integer.
    pub fn signed(&mut self, what: &str) -> Result<i64> {
        let value = self.varint(what, u64::MAX)?;
        Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }

    /// A number of entries, each of which takes at least one byte of what is left.
    pub fn count(&mut self, what: &str, max: usize) -> Result<usize> {
        let count = self.varint(what, max as u64)? as usize;
        if count > self.rest.len() {
            return Err(self.bad(format!("{count} {what} in {} bytes", self.rest.len()), "a complete table"));
        }
        Ok(count)
    }

    /// A string.
    pub fn str(&mut self, what: &str) -> Result<&'a str> {
        let len = self.count(what, usize::MAX)?;
        let bytes = self.take(len)?;
        self.utf8(what, bytes)
    }

    /// `bytes` as text.
    pub fn utf8(&self, what: &str, bytes: &'a [u8]) -> Result<&'a str> {
        std::str::from_utf8(bytes).map_err(|_| self.bad(format!("{what} is not UTF-8"), "text"))
    }

    /// `text`, which is to be shown on one line.
    pub fn line(&self, what: &str, text: &'a str) -> Result<&'a str> {
        match text.contains(char::is_control) {
            false => Ok(text),
            true => Err(self.bad(format!("{what} {text:?}"), "no control characters")),
        }
    }

    /// `len` flags.
    pub fn bits(&mut self, len: usize) -> Result<Vec<bool>> {
        let bytes = self.take(len.div_ceil(8))?;
        Ok((0..len).map(|i| bytes[i / 8] >> (i % 8) & 1 == 1).collect())
    }

    /// Checks that nothing is left.
    pub fn finish(self) -> Result<()> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(self.bad(format!("{} bytes behind its end", self.rest.len()), "a complete table and no more"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_flags_come_back() {
        let mut out = Vec::new();
        let unsigned = [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX];
        let signed = [0, -1, 1, 63, -64, 64, i64::MAX, i64::MIN];
        unsigned.iter().for_each(|&v| put_varint(&mut out, v));
        signed.iter().for_each(|&v| put_signed(&mut out, v));
        put_bits(&mut out, &[true, false, true, true, false, false, false, false, true]);
        put_str(&mut out, "▁the");
        let mut cursor = Cursor::new(&out, "table", "x");
        for value in unsigned {
            assert_eq!(cursor.varint("v", u64::MAX).unwrap(), value);
        }
        for value in signed {
            assert_eq!(cursor.signed("v").unwrap(), value);
        }
        assert_eq!(cursor.bits(9).unwrap(), [true, false, true, true, false, false, false, false, true]);
        assert_eq!(cursor.str("s").unwrap(), "▁the");
        cursor.finish().unwrap();
    }

    #[test]
    fn bad_bytes_are_errors_of_one_line() {
        let read = |bytes: &[u8]| Cursor::new(bytes, "table", "x").varint("v", 1000);
        for bytes in [&[][..], &[0x80], &[0xff; 10], &[0xff; 20], &[0xe9, 0x07]] {
            let error = read(bytes).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bytes:?}");
        }
        assert_eq!(read(&[0xe8, 0x07]).unwrap(), 1000);
        assert!(Cursor::new(&[5, b'a'], "table", "x").str("s").is_err());
        assert!(Cursor::new(&[1, 0xff], "table", "x").str("s").is_err());
        assert!(Cursor::new(&[1], "table", "x").bits(9).is_err());
        assert!(Cursor::new(&[1], "table", "x").finish().is_err());
    }
}

//! Bytes that come in pieces, as lines.

/// A line longer than this is passed on in pieces, so that a stream without line ends does not fill the memory.
const LONGEST: usize = 16 << 20;

/// Splits a stream into lines.
///
/// A line ends with `\n`, `\r\n`, or, as progress bars have it, `\r`; between carriage returns an empty line is none.
#[derive(Default)]
pub struct Lines {
    partial: Vec<u8>,
    /// The line before was ended by `\r`: a `\n` that follows belongs to it.
    returned: bool,
}

impl Lines {
    /// Calls `each` with every line that `bytes` complete, without its end.
    pub fn split(&mut self, mut bytes: &[u8], mut each: impl FnMut(&[u8])) {
        while let Some(at) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let (line, end) = (&bytes[..at], bytes[at]);
            bytes = &bytes[at + 1..];
            let empty = line.is_empty() && self.partial.is_empty();
            if empty && (end == b'\r' || self.returned) {
                self.returned &= end == b'\r';
                continue;
            }
            self.returned = end == b'\r';
            if self.partial.is_empty() {
                each(line);
            } else {
                self.partial.extend_from_slice(line);
                each(&self.partial);
                self.partial.clear();
            }
        }
        self.returned &= bytes.is_empty();
        self.partial.extend_from_slice(bytes);
        if self.partial.len() >= LONGEST {
            self.finish(each);
        }
    }

    /// Calls `each` with what follows the last line end, if anything does.
    pub fn finish(&mut self, mut each: impl FnMut(&[u8])) {
        if !self.partial.is_empty() {
            each(&self.partial);
            self.partial.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
        let (mut lines, mut found) = (Lines::default(), vec![]);
        for piece in pieces {
            lines.split(piece, |line| found.push(line.to_vec()));
        }
        lines.finish(|line| found.push(line.to_vec()));
        found
    }

    #[test]
    fn the_same_lines_however_the_bytes_are_cut() {
        let cases: [(&[u8], &[&[u8]]); 8] = [
            (b"", &[]),
            (b"a\nbc\n", &[b"a", b"bc"]),
            (b"a\n\n\nb", &[b"a", b"", b"", b"b"]),
            (b"a\r\n\r\nb\r\n", &[b"a", b"", b"b"]),
            (b"\r 1%\r 2%\r\r 3%\n", &[b" 1%", b" 2%", b" 3%"]),
            (b" 1%\r 2%\r\r\nb\n\n", &[b" 1%", b" 2%", b"b", b""]),
            (b"a\rb\n\n", &[b"a", b"b", b""]),
            (b"\xff\0\xfe\n\xc3", &[b"\xff\0\xfe", b"\xc3"]),
        ];
        for (bytes, expected) in cases {
            assert_eq!(lines([bytes]), expected, "{bytes:?} at once");
            assert_eq!(lines(bytes.chunks(1)), expected, "{bytes:?} byte by byte");
            for at in 0..bytes.len() {
                assert_eq!(lines([&bytes[..at], &bytes[at..]]), expected, "{bytes:?} cut at {at}");
            }
        }
    }

    #[test]
    fn a_line_without_end_comes_in_pieces() {
        let piece = vec![b'x'; 1 << 20];
        let found = lines((0..33).map(|_| piece.as_slice()));
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [LONGEST, LONGEST, 1 << 20]);
    }
}

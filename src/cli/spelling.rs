//! Both spellings of every flag: `--n-layer`, and argparse's `--n_layer`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Turns underscores in the names of long flags into hyphens. Values stay as they are, also those
/// behind `=`, and so does everything after `--`.
pub fn normalise(args: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    let mut flags_end = false;
    args.map(move |arg| {
        flags_end |= arg == OsStr::new("--");
        let bytes = arg.as_bytes();
        if flags_end || !bytes.starts_with(b"--") {
            return arg;
        }
        let name = bytes.iter().position(|&b| b == b'=').unwrap_or(bytes.len());
        let mut bytes = bytes.to_vec();
        bytes[2..name].iter_mut().filter(|b| **b == b'_').for_each(|b| *b = b'-');
        OsString::from_vec(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_change_and_values_do_not() {
        let given = ["bbt", "--n_layer", "a_b", "--out=runs/a_b", "-x_y", "--", "--n_layer"];
        let expected = ["bbt", "--n-layer", "a_b", "--out=runs/a_b", "-x_y", "--", "--n_layer"];
        assert!(normalise(given.map(OsString::from).into_iter()).eq(expected.map(OsString::from)));
    }
}

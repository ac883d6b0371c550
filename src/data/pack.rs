//! Makes shards from files: what `bbt pack` does.
//!
//! ```text
//! OUT/train/shard_00000.bin, shard_00001.bin, ...
//! OUT/val/shard_00000.bin, ...                     where there is validation data
//! OUT/manifest.json                                the report: what separates the documents, and the totals
//! ```
//!
//! A document is a file, or a stream, with at least one byte. The shards of a split, one after another, are its documents
//! with the separator between them; [`PackOptions`] says how they are found, dealt and cut. The same files
//! give the same bytes. Memory holds the list of documents and one buffer, never a document.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use walkdir::WalkDir;

use super::DataError;
use super::pack_plan::{Piece, shard_sizes, split};
use super::stream;
use crate::utils::atomic;

/// Name of the report in the output directory.
pub const MANIFEST: &str = "manifest.json";

/// Bytes read at a time.
const BUFFER: usize = 1 << 20;

/// What to pack and how.
#[derive(Debug, Clone)]
pub struct PackOptions {
    /// Files and directories. Documents come in this order, those of a directory by the bytes of their path in
    /// it. In directories, hidden files and directories (`.git`), links to directories and what is neither
    /// file nor directory are passed over; so are the output directory, files found before, and, with a warning, links
    /// that lead nowhere. `-` is standard input, which is read to its end, as other streams that the shell opens are
    /// ([`is_stream`](super::stream::is_stream)).
    pub inputs: Vec<PathBuf>,
    /// The directory to make, or an empty one to fill, which may be a mount point.
    pub out: PathBuf,
    /// Lay the shards of `train` into `out` itself, as the original does. There is no place for validation then.
    pub flat: bool,
    /// Bytes per shard, about: from half of it to one and a half times as much, the last of a split up to
    /// twice as much, and a split with less than half makes one shard. At least 4. Documents up to this size
    /// stay in one piece.
    pub shard_size: u64,
    /// The byte between two documents; none: nothing. NUL occurs in no text, so that a model which writes it
    /// means a document's end.
    pub separator: Option<u8>,
    /// Take only files with one of these extensions, in any case, with or without the dot; empty: all.
    pub extensions: Vec<String>,
    /// Fraction of the bytes for validation, 0 to 0.5. Documents go whole to one side, chosen by their sizes
    /// alone, so that validation comes near its share and not above; where whole documents fill less than half
    /// of it, as where there is only one, validation gets the rest of its share from the end of a document.
    pub val_frac: f64,
    /// Replace `out` where it is an earlier output.
    pub allow_overwrite: bool,
}

impl Default for PackOptions {
    /// 64 MiB shards, NUL between documents, all files, no validation, no overwriting; neither input nor output.
    fn default() -> Self {
        Self {
            inputs: Vec::new(),
            out: PathBuf::new(),
            flat: false,
            shard_size: 64 << 20,
            separator: Some(0),
            extensions: Vec::new(),
            val_frac: 0.0,
            allow_overwrite: false,
        }
    }
}

/// What was packed; also what the manifest holds, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackReport {
    /// The byte between two documents.
    pub separator: Option<u8>,
    /// Training data.
    pub train: SplitReport,
    /// Validation data.
    pub val: Option<SplitReport>,
    /// The document whose end went to validation because whole ones would have filled too little of it.
    pub divided: Option<String>,
    /// What is worth a look; not part of the manifest.
    #[serde(skip)]
    pub warnings: Vec<PackWarning>,
}

/// Something that packing went on in spite of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PackWarning {
    /// A link in a directory that leads nowhere, or in a circle.
    #[error("{}: a link that leads nowhere, passed over", .0.display())]
    DanglingLink(PathBuf),
    /// A file that another program has compressed.
    #[error(
        "{}: packed as it is, but it looks compressed ({what}): a model learns little from that; unpack it first",
        path.display()
    )]
    Compressed {
        /// The file.
        path: PathBuf,
        /// With what.
        what: &'static str,
    },
}

/// Sizes of one split.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitReport {
    /// Number of documents; a divided one counts in both splits.
    pub documents: u64,
    /// Bytes in all shards, separators included.
    pub bytes: u64,
    /// Number of shards.
    pub shards: u64,
}

/// A file to pack.
struct Document {
    /// As the user knows it.
    name: PathBuf,
    /// Where its bytes are: `name`, or of a stream a copy of what was read.
    path: PathBuf,
    /// None: a stream that has not been read yet.
    size: Option<u64>,
}

/// How compressed files begin.
const COMPRESSED: [(&str, &[u8]); 7] = [
    ("gzip", b"\x1f\x8b\x08"),
    ("zstd", b"\x28\xb5\x2f\xfd"),
    ("xz", b"\xfd7zXZ\0"),
    ("bzip2", b"BZh"),
    ("zip", b"PK\x03\x04"),
    ("lz4", b"\x04\x22\x4d\x18"),
    ("7z", b"7z\xbc\xaf\x27\x1c"),
];

/// Packs files into shards. `progress` is told the bytes of documents done and in all, and (0, 0) while a stream is
/// read, of which nobody knows how long it is; `Break` ends it.
///
/// The output is written to a hidden directory beside `out`, synced, and renamed: `out` is whole or not there. Where
/// `out` is there already, empty or an earlier output, the hidden directory is in it, for it may be a mount point, which
/// cannot be renamed; its parts are then moved in one by one, the manifest last. What fails or is interrupted leaves
/// nothing; what is killed leaves the hidden directory (`.OUT.*`, `.packing.*`), which can be deleted, and after a kill
/// between two moves holds the parts of the earlier output.
///
/// # Errors
/// Options out of range; an output that exists (see [`PackOptions::allow_overwrite`]) or cannot be written; an
/// input that is missing or unreadable, or changes meanwhile; inputs without data; `Break` from `progress`.
pub fn pack(
    options: &PackOptions,
    mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<PackReport, DataError> {
    let out = Output::check(options)?;
    let Found { documents, mut warnings } = find(options)?;
    let staging = out.staging()?;
    let mut told = |done, total| match progress(done, total) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(DataError::Interrupted),
    };
    let documents = read_streams(documents, staging.path(), || told(0, 0))?;
    if documents.is_empty() {
        return Err(no_documents(options));
    }
    let sizes: Vec<u64> = documents.iter().map(|document| document.size.unwrap_or(0)).collect();
    let plan = split(&sizes, options.val_frac);

    let new = staging.path().join("new");
    create_dir(&new)?;
    let (mut done, total) = (0, sizes.iter().sum());
    let mut read = |bytes: u64| {
        done += bytes;
        told(done, total)
    };
    let mut write = |name, pieces: &[Piece]| {
        let dir = if options.flat { new.clone() } else { new.join(name) };
        if !options.flat {
            create_dir(&dir)?;
        }
        write_split(&dir, options, &documents, pieces, &mut read, &mut warnings)
    };
    let mut report = PackReport {
        separator: options.separator,
        train: write("train", &plan.train)?,
        val: if plan.val.is_empty() { None } else { Some(write("val", &plan.val)?) },
        divided: plan.divided.map(|document| documents[document].name.display().to_string()),
        warnings: Vec::new(),
    };
    report.warnings = warnings;
    write_manifest(&new.join(MANIFEST), &report)?;
    sync_dir(&new)?;
    out.replace(staging.path(), &new)?;
    Ok(report)
}

/// Where the output goes.
struct Output<'a> {
    path: &'a Path,
    parent: PathBuf,
    name: String,
    /// Whether `path` is a directory already, empty or an earlier output.
    there: bool,
    /// The earlier output.
    earlier: Option<PackReport>,
}

impl<'a> Output<'a> {
    /// Checks the options, and that the output may be written.
    fn check(options: &'a PackOptions) -> Result<Self, DataError> {
        if options.shard_size < 4 {
            return Err(DataError::invalid("shard_size", format!("{} bytes is less than 4", options.shard_size)));
        }
        if !(0.0..=0.5).contains(&options.val_frac) {
            return Err(DataError::invalid("val_frac", format!("{} is not within 0 and 0.5", options.val_frac)));
        }
        if options.flat && options.val_frac > 0.0 {
            let message = format!(
                "{}: shards that lie in the output directory itself leave no place for validation: give --out, which \
                 gets train/ and val/, instead of --out-dir",
                options.val_frac
            );
            return Err(DataError::invalid("val_frac", message));
        }
        let path = &options.out;
        let Some(name) = path.file_name() else {
            let message = format!("`{}` does not name a new directory", path.display());
            return Err(DataError::invalid("out", message));
        };
        let (mut there, mut earlier) = (false, None);
        if fs::symlink_metadata(path).is_ok() {
            there = true;
            if !is_empty(path) {
                if !options.allow_overwrite {
                    return Err(DataError::Exists { path: path.into() });
                }
                // Parts of it are about to be deleted: a mistyped name must not cost more than an earlier output.
                let manifest = fs::read(path.join(MANIFEST)).unwrap_or_default();
                earlier = serde_json::from_slice(&manifest).ok();
                if path.is_symlink() || earlier.is_none() {
                    return Err(DataError::NotPacked { path: path.into() });
                }
            }
        }
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.into(),
            _ => PathBuf::from("."),
        };
        Ok(Self { path, parent, name: name.to_string_lossy().into_owned(), there, earlier })
    }

    /// A hidden directory in or beside the output, deleted when dropped.
    fn staging(&self) -> Result<tempfile::TempDir, DataError> {
        let (dir, prefix) = match self.there {
            true => (self.path, ".packing.".into()),
            false => (self.parent.as_path(), format!(".{}.", self.name)),
        };
        fs::create_dir_all(dir).map_err(DataError::io("create", dir))?;
        tempfile::Builder::new().prefix(&prefix).tempdir_in(dir).map_err(DataError::io("write to", dir))
    }

    /// Puts `new` in the output's place; what was there goes to `staging`.
    fn replace(&self, staging: &Path, new: &Path) -> Result<(), DataError> {
        if self.there {
            return self.fill(staging, new);
        }
        fs::rename(new, self.path).map_err(DataError::io("create", self.path))?;
        sync_dir(&self.parent)
    }

    /// Moves the parts of the earlier output to `staging` and those of `new` into the output: the manifest leaves first
    /// and comes last, so that an output with a manifest is whole.
    fn fill(&self, staging: &Path, new: &Path) -> Result<(), DataError> {
        let old = staging.join("old");
        create_dir(&old)?;
        let mut names: Vec<_> = fs::read_dir(new)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>())
            .map_err(DataError::io("list", new))?;
        names.sort_by_key(|name| (name == MANIFEST, name.clone()));
        let out = self.earlier_parts().into_iter().map(|name| (self.path.join(&name), old.join(&name)));
        let moves: Vec<_> = out.chain(names.iter().map(|name| (new.join(name), self.path.join(name)))).collect();
        for (index, (from, to)) in moves.iter().enumerate() {
            if let Err(error) = fs::rename(from, to) {
                for (from, to) in moves[..index].iter().rev() {
                    fs::rename(to, from).map_err(DataError::io("put back", from))?;
                }
                return Err(DataError::io("write to", self.path)(error));
            }
        }
        sync_dir(self.path)
    }

    /// The names in the output directory that an earlier output is made of, the manifest first. Whatever else lies
    /// there stays.
    fn earlier_parts(&self) -> Vec<String> {
        let Some(earlier) = &self.earlier else { return vec![] };
        let mut names = vec![MANIFEST.to_string()];
        let folders = ["train", "val"].map(String::from).into_iter().filter(|name| self.path.join(name).is_dir());
        names.extend(folders);
        let shards = (0..earlier.train.shards as usize).map(shard_name);
        names.extend(shards.filter(|name| self.path.join(name).is_file()));
        names
    }
}

/// Whether `path` is a directory with nothing in it; the folder that the root of a file system may have does not count.
fn is_empty(path: &Path) -> bool {
    let nothing = |mut entries: fs::ReadDir| entries.all(|entry| entry.is_ok_and(|e| e.file_name() == "lost+found"));
    fs::read_dir(path).is_ok_and(nothing)
}

/// What was found.
struct Found {
    documents: Vec<Document>,
    warnings: Vec<PackWarning>,
}

/// The documents, in order: files with at least one byte, and streams that are still to be read.
fn find(options: &PackOptions) -> Result<Found, DataError> {
    let wanted = |path: &Path| {
        let extension = path.extension().unwrap_or_default();
        let mut wanted = options.extensions.iter();
        options.extensions.is_empty() || wanted.any(|e| extension.eq_ignore_ascii_case(e.trim_start_matches('.')))
    };
    let mut found = Found { documents: Vec::new(), warnings: Vec::new() };
    let mut seen = HashSet::new();
    for input in &options.inputs {
        if stream::is_stream(input) {
            if seen.insert(input.clone()) {
                found.documents.push(Document { name: input.clone(), path: input.clone(), size: None });
            }
            continue;
        }
        let metadata = match fs::metadata(input) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(DataError::Missing { path: input.clone() });
            }
            Err(error) => return Err(DataError::io("read", input)(error)),
        };
        let files = if metadata.is_dir() { files_in(input, &options.out)? } else { vec![input.clone()] };
        for path in files.into_iter().filter(|path| wanted(path)) {
            let metadata = match fs::metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) if path != *input && path.is_symlink() && leads_nowhere(&error) => {
                    found.warnings.push(PackWarning::DanglingLink(path));
                    continue;
                }
                Err(error) => return Err(DataError::io("read", &path)(error)),
            };
            let real = fs::canonicalize(&path).map_err(DataError::io("read", &path))?;
            if metadata.is_file() && metadata.len() > 0 && seen.insert(real) {
                found.documents.push(Document { name: path.clone(), path, size: Some(metadata.len()) });
            } else if !metadata.is_file() && path == *input {
                let error = io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a directory");
                return Err(DataError::io("pack", &path)(error));
            }
        }
    }
    if found.documents.is_empty() {
        return Err(no_documents(options));
    }
    Ok(found)
}

fn no_documents(options: &PackOptions) -> DataError {
    let inputs: Vec<String> = options.inputs.iter().map(|input| input.display().to_string()).collect();
    let filter = match options.extensions.as_slice() {
        [] => String::new(),
        extensions => format!(" and one of the extensions {}", extensions.join(", ")),
    };
    DataError::NoDocuments { inputs: inputs.join(", "), filter }
}

/// Whether that is what a link whose target is missing, or which leads to itself, fails with.
fn leads_nowhere(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ELOOP)
}

/// Reads the streams among `documents` to their ends, into files of the directory `to`: where documents go is decided
/// by their sizes. Leaves out those without a byte.
fn read_streams(
    documents: Vec<Document>,
    to: &Path,
    mut go_on: impl FnMut() -> Result<(), DataError>,
) -> Result<Vec<Document>, DataError> {
    let mut read = Vec::with_capacity(documents.len());
    for (index, document) in documents.into_iter().enumerate() {
        if document.size.is_some() {
            read.push(document);
            continue;
        }
        let path = to.join(format!("stream-{index}"));
        let mut file = File::create_new(&path).map_err(DataError::io("create", &path))?;
        let size = stream::copy(&document.name, &mut file, &path, &mut go_on)?;
        if size > 0 {
            read.push(Document { name: document.name, path, size: Some(size) });
        }
    }
    Ok(read)
}

/// All but directories and hidden entries under `dir`, by the bytes of their path in it; `except` is left out.
fn files_in(dir: &Path, except: &Path) -> Result<Vec<PathBuf>, DataError> {
    let except = fs::canonicalize(except).ok();
    let entries = WalkDir::new(dir).into_iter().filter_entry(|entry| {
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        let is_out = entry.file_type().is_dir() && except.is_some() && fs::canonicalize(entry.path()).ok() == except;
        entry.depth() == 0 || !(hidden || is_out)
    });
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| {
            let path = error.path().unwrap_or(dir).to_path_buf();
            let source = error.into_io_error().unwrap_or_else(|| io::Error::other("a directory within itself"));
            DataError::io("read", &path)(source)
        })?;
        if !entry.file_type().is_dir() {
            files.push(entry.into_path());
        }
    }
    // All begin with `dir`, so that comparing them compares what follows it.
    files.sort_by(|a, b| a.as_os_str().as_encoded_bytes().cmp(b.as_os_str().as_encoded_bytes()));
    Ok(files)
}

/// Writes one split's shards to the directory `dir`. `read` is told the bytes of each read.
fn write_split(
    dir: &Path,
    options: &PackOptions,
    documents: &[Document],
    pieces: &[Piece],
    read: &mut impl FnMut(u64) -> Result<(), DataError>,
    warnings: &mut Vec<PackWarning>,
) -> Result<SplitReport, DataError> {
    let separator = options.separator.as_slice();
    // The separator counts to the document before it, so that a shard begins with a document.
    let units = pieces
        .iter()
        .enumerate()
        .map(|(index, piece)| piece.len() + if index + 1 < pieces.len() { separator.len() as u64 } else { 0 });
    let sizes = shard_sizes(units, options.shard_size);
    let report = SplitReport { documents: pieces.len() as u64, bytes: sizes.iter().sum(), shards: sizes.len() as u64 };

    let mut shards = ShardWriter { dir, begun: 0, sizes: sizes.into_iter(), current: None };
    let mut buffer = vec![0; BUFFER];
    for (index, piece) in pieces.iter().enumerate() {
        if index > 0 {
            shards.write(separator)?;
        }
        let Document { name, path, size } = &documents[piece.document];
        let mut file = File::open(path).map_err(DataError::io("open", path))?;
        let now = file.metadata().map_err(DataError::io("read", path))?.len();
        file.seek(SeekFrom::Start(piece.start)).map_err(DataError::io("read", path))?;
        let mut left = piece.len();
        while left > 0 {
            let wanted = left.min(BUFFER as u64) as usize;
            let count = file.read(&mut buffer[..wanted]).map_err(DataError::io("read", path))?;
            if count == 0 || Some(now) != *size {
                return Err(DataError::Changed { path: path.clone() });
            }
            if piece.start == 0
                && left == piece.len()
                && let Some((what, _)) = COMPRESSED.iter().find(|(_, magic)| buffer[..count].starts_with(magic))
            {
                warnings.push(PackWarning::Compressed { path: name.clone(), what });
            }
            shards.write(&buffer[..count])?;
            left -= count as u64;
            read(count as u64)?;
        }
    }
    shards.finish()?;
    sync_dir(dir)?;
    Ok(report)
}

/// A stream of bytes over files of given sizes.
struct ShardWriter<'a> {
    dir: &'a Path,
    /// Number of shards begun.
    begun: usize,
    /// Sizes of the others.
    sizes: std::vec::IntoIter<u64>,
    current: Option<OpenShard>,
}

struct OpenShard {
    path: PathBuf,
    file: BufWriter<File>,
    /// Bytes until it is full.
    left: u64,
}

impl ShardWriter<'_> {
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), DataError> {
        while !bytes.is_empty() {
            let mut shard = match self.current.take() {
                Some(shard) if shard.left > 0 => shard,
                full => {
                    full.map_or(Ok(()), OpenShard::finish)?;
                    self.begin()?
                }
            };
            let count = shard.left.min(bytes.len() as u64) as usize;
            shard.file.write_all(&bytes[..count]).map_err(DataError::io("write", &shard.path))?;
            shard.left -= count as u64;
            bytes = &bytes[count..];
            self.current = Some(shard);
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<OpenShard, DataError> {
        // The sizes add up to all that is written, so a shard without one does not come about.
        let left = self.sizes.next().unwrap_or(u64::MAX);
        let path = self.dir.join(shard_name(self.begun));
        self.begun += 1;
        let file = File::create_new(&path).map_err(DataError::io("create", &path))?;
        Ok(OpenShard { file: BufWriter::with_capacity(BUFFER, file), path, left })
    }

    fn finish(self) -> Result<(), DataError> {
        self.current.map_or(Ok(()), OpenShard::finish)
    }
}

impl OpenShard {
    fn finish(self) -> Result<(), DataError> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error);
        file.and_then(|file| file.sync_all()).map_err(DataError::io("write", &self.path))
    }
}

fn shard_name(number: usize) -> String {
    format!("shard_{number:05}.bin")
}

fn write_manifest(path: &Path, report: &PackReport) -> Result<(), DataError> {
    let write = || -> io::Result<()> {
        let mut file = File::create_new(path)?;
        serde_json::to_writer_pretty(&mut file, report)?;
        file.write_all(b"\n")?;
        file.sync_all()
    };
    write().map_err(DataError::io("write", path))
}

fn create_dir(path: &Path) -> Result<(), DataError> {
    fs::create_dir(path).map_err(DataError::io("create", path))
}

/// Makes the names in a directory last.
fn sync_dir(path: &Path) -> Result<(), DataError> {
    atomic::sync_dir(path).map_err(DataError::io("sync", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;
    use tempfile::{TempDir, tempdir};

    use super::*;
    use crate::data::open;

    fn tree(files: &[(&str, &str)]) -> TempDir {
        let dir = tempdir().unwrap();
        for (name, content) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        dir
    }

    fn options(inputs: &[&Path], out: &Path) -> PackOptions {
        PackOptions { inputs: inputs.iter().map(|&p| p.into()).collect(), out: out.into(), ..PackOptions::default() }
    }

    fn run(options: &PackOptions) -> Result<PackReport, String> {
        pack(options, |_, _| ControlFlow::Continue(())).map_err(|error| error.to_string())
    }

    /// The bytes of a split's shards, one after another.
    fn bytes(dir: &Path) -> Vec<u8> {
        open(dir.to_str().unwrap()).unwrap().shards().iter().flat_map(|shard| shard.bytes().to_vec()).collect()
    }

    fn text(out: &Path) -> String {
        String::from_utf8(bytes(&out.join("train"))).unwrap()
    }

    /// Names in a directory, hidden ones too.
    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn documents_come_in_order_with_separators_between() {
        let dir = tree(&[
            ("in/b/2.txt", "b2"),
            ("in/b.txt", "b"),
            ("in/a/1.md", "a1"),
            ("in/empty.txt", ""),
            ("in/.git/x.txt", "hidden"),
            ("in/.x.txt", "hidden"),
            ("z.TXT", "z"),
        ]);
        let (input, z, out) = (dir.path().join("in"), dir.path().join("z.TXT"), dir.path().join("deep/out"));
        let all = PackOptions { separator: Some(b'|'), ..options(&[&z, &input], &out) };
        let report = run(&all).unwrap();
        // `.` sorts before `/`.
        assert_eq!(text(&out), "z|a1|b|b2");
        let train = SplitReport { documents: 4, bytes: 9, shards: 1 };
        assert_eq!(report, PackReport { separator: Some(b'|'), train, val: None, divided: None, warnings: vec![] });
        let manifest: PackReport = serde_json::from_slice(&fs::read(out.join(MANIFEST)).unwrap()).unwrap();
        assert_eq!(manifest, report);
        assert_eq!(names(&out), [MANIFEST, "train"]);

        let out = dir.path().join("out");
        let txt = PackOptions { separator: None, extensions: vec![".txt".into()], ..options(&[&input, &z], &out) };
        run(&txt).unwrap();
        assert_eq!(text(&out), "bb2z");

        // A hidden file counts where it is named itself.
        let out = dir.path().join("named");
        run(&options(&[&input.join(".x.txt")], &out)).unwrap();
        assert_eq!(text(&out), "hidden");
    }

    #[test]
    fn a_file_is_taken_once_and_links_do_not_loop() {
        let dir = tree(&[("in/a", "A"), ("in/b", "B")]);
        let input = dir.path().join("in");
        symlink(&input, input.join("loop")).unwrap();
        symlink(input.join("a"), input.join("c")).unwrap();
        let out = dir.path().join("out");
        run(&options(&[&input.join("b"), &input, &input], &out)).unwrap();
        assert_eq!(text(&out), "B\0A");
    }

    #[test]
    fn links_that_lead_nowhere_are_passed_over_with_a_warning() {
        let dir = tree(&[("in/a", "A"), ("in/deep/b", "B")]);
        let (input, out) = (dir.path().join("in"), dir.path().join("out"));
        let links = ["circle", "dangling", "deep/dangling.txt"].map(|name| input.join(name));
        symlink(&links[0], &links[0]).unwrap();
        symlink(dir.path().join("nowhere"), &links[1]).unwrap();
        symlink("nowhere", &links[2]).unwrap();
        let report = run(&options(&[&input], &out)).unwrap();
        assert_eq!(text(&out), "A\0B");
        assert_eq!(report.warnings, links.clone().map(PackWarning::DanglingLink));
        // What --ext leaves out is not worth a word; a link that is named itself must lead somewhere.
        let only = PackOptions { extensions: vec!["txt".into()], ..options(&[&input.join("a"), &input], &out) };
        fs::write(input.join("c.txt"), "C").unwrap();
        let only = PackOptions { out: dir.path().join("only"), ..only };
        assert_eq!(run(&only).unwrap().warnings, [PackWarning::DanglingLink(links[2].clone())]);
        for link in links {
            let message = run(&options(&[&link], &dir.path().join("out2"))).unwrap_err();
            assert!(message.starts_with(link.to_str().unwrap()), "{message}");
        }
    }

    #[test]
    fn compressed_files_are_packed_with_a_warning() {
        let dir = tree(&[("in/a.txt", "A"), ("in/short", "B")]);
        let (input, out) = (dir.path().join("in"), dir.path().join("out"));
        let compressed = [
            ("b.gz", "gzip", &[0x1f, 0x8b, 8, 0, 0][..]),
            ("c.zst", "zstd", &[0x28, 0xb5, 0x2f, 0xfd, 4]),
            ("d.xz", "xz", b"\xfd7zXZ\0\0"),
            ("e.bz2", "bzip2", b"BZh91AY"),
            ("f.zip", "zip", b"PK\x03\x04\x14"),
        ];
        for (name, _, bytes) in compressed {
            fs::write(input.join(name), bytes).unwrap();
        }
        let report = run(&options(&[&input], &out)).unwrap();
        let expected = compressed.map(|(name, what, _)| PackWarning::Compressed { path: input.join(name), what });
        assert_eq!(report.warnings, expected);
        assert_eq!(report.train.documents, 7);
    }

    #[test]
    fn an_empty_directory_is_filled() {
        let dir = tree(&[("in/a", "A"), ("in/b", "B")]);
        let (input, out) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir_all(out.join("lost+found")).unwrap();
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let before = inode(&out);
        // What fails leaves it empty.
        let error = pack(&options(&[&input], &out), |_, _| ControlFlow::Break(()));
        assert!(matches!(error, Err(DataError::Interrupted)));
        assert_eq!(names(&out), ["lost+found"]);

        run(&options(&[&input], &out)).unwrap();
        assert_eq!(names(&out), ["lost+found", MANIFEST, "train"]);
        assert_eq!((text(&out).as_str(), inode(&out)), ("A\0B", before), "the directory itself stays");

        // Replaced in place; what the user has laid beside it stays.
        fs::write(out.join("notes.txt"), "mine").unwrap();
        fs::write(input.join("c"), "C").unwrap();
        let over = PackOptions { allow_overwrite: true, val_frac: 0.4, ..options(&[&input], &out) };
        run(&over).unwrap();
        assert_eq!(names(&out), ["lost+found", MANIFEST, "notes.txt", "train", "val"]);
        let flat = PackOptions { val_frac: 0.0, flat: true, ..over.clone() };
        run(&flat).unwrap();
        assert_eq!(names(&out), ["lost+found", MANIFEST, "notes.txt", "shard_00000.bin"]);
        assert_eq!(bytes(&out), b"A\0B\0C");
        run(&PackOptions { shard_size: 4, ..over }).unwrap();
        assert_eq!(names(&out), ["lost+found", MANIFEST, "notes.txt", "train", "val"]);

        // Through a link, too.
        let (link, other) = (dir.path().join("link"), dir.path().join("other"));
        fs::create_dir(&other).unwrap();
        symlink(&other, &link).unwrap();
        run(&options(&[&input], &link)).unwrap();
        assert!(link.is_symlink());
        assert_eq!(names(&other), [MANIFEST, "train"]);
    }

    #[test]
    fn the_output_is_never_an_input() {
        let dir = tree(&[("a", "A")]);
        let out = dir.path().join("out");
        let options = PackOptions { allow_overwrite: true, ..options(&[dir.path()], &out) };
        run(&options).unwrap();
        run(&options).unwrap();
        assert_eq!(text(&out), "A");
        assert_eq!(names(dir.path()), ["a", "out"]);
    }

    #[test]
    fn only_an_earlier_output_is_overwritten() {
        let dir = tree(&[("in/a", "A"), ("precious/b", "B")]);
        let (input, out) = (dir.path().join("in"), dir.path().join("out"));
        run(&options(&[&input], &out)).unwrap();
        fs::write(input.join("b"), "B").unwrap();
        let message = run(&options(&[&input], &out)).unwrap_err();
        assert!(message.starts_with(&format!("{}: exists already", out.display())), "{message}");
        assert_eq!(text(&out), "A");

        let over = PackOptions { allow_overwrite: true, ..options(&[&input], &out) };
        run(&over).unwrap();
        assert_eq!(text(&out), "A\0B");

        let precious = PackOptions { out: dir.path().join("precious"), ..over.clone() };
        assert!(run(&precious).unwrap_err().contains("not a directory that `bbt pack` made"));
        symlink(&out, dir.path().join("link")).unwrap();
        let link = PackOptions { out: dir.path().join("link"), ..over };
        assert!(run(&link).unwrap_err().contains("not a directory that `bbt pack` made"));
        assert_eq!(names(dir.path()), ["in", "link", "out", "precious"]);
    }

    #[test]
    fn failure_and_interruption_leave_nothing() {
        let dir = tree(&[("in/a", "A"), ("in/b", "B"), ("in/c", "C")]);
        let (input, out) = (dir.path().join("in"), dir.path().join("out"));
        let mut seen = Vec::new();
        let error = pack(&options(&[&input], &out), |done, total| {
            seen.push((done, total));
            // Until all is done, there is only the hidden directory.
            assert!(!out.exists() && names(dir.path()).len() == 2);
            if done == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(error, Err(DataError::Interrupted)));
        assert_eq!(seen, [(1, 3), (2, 3)]);
        assert_eq!(names(dir.path()), ["in"]);

        // A file that shrinks, and one that vanishes, after the list was made.
        let error = pack(&options(&[&input], &out), |_, _| {
            fs::write(input.join("b"), "").unwrap();
            ControlFlow::Continue(())
        });
        assert!(error.unwrap_err().to_string().starts_with(&format!("{}: changed", input.join("b").display())));
        assert_eq!(names(dir.path()), ["in"]);
        let error = pack(&options(&[&input], &out), |_, _| {
            let _ = fs::remove_file(input.join("c"));
            ControlFlow::Continue(())
        });
        assert!(error.unwrap_err().to_string().starts_with(input.join("c").to_str().unwrap()));
        assert_eq!(names(dir.path()), ["in"]);
    }

    #[test]
    fn errors_name_the_option_or_the_path() {
        let dir = tree(&[("in/a.txt", "A"), ("in/e.md", "")]);
        let (input, out) = (dir.path().join("in"), dir.path().join("out"));
        let base = options(&[&input], &out);
        let message = |options: PackOptions| run(&options).unwrap_err();
        assert!(message(PackOptions { shard_size: 0, ..base.clone() }).starts_with("shard_size"));
        for val_frac in [-0.1, 0.6, f64::NAN] {
            assert!(message(PackOptions { val_frac, ..base.clone() }).starts_with("val_frac"));
        }
        assert!(message(PackOptions { out: "/".into(), ..base.clone() }).starts_with("out: `/`"));
        let nowhere = dir.path().join("nowhere");
        assert!(message(options(&[&nowhere], &out)).starts_with(nowhere.to_str().unwrap()));
        let nothing = message(PackOptions { extensions: vec!["md".into()], ..base.clone() });
        assert!(nothing.starts_with(&format!("{}: no file with data and one of the extensions md", input.display())));
        assert!(message(options(&[Path::new("/dev/null")], &out)).starts_with("/dev/null: cannot pack"));
        assert_eq!(names(dir.path()), ["in"]);
    }

    #[test]
    fn one_document_gives_its_end_to_validation() {
        let dir = tree(&[("text", &"0123456789".repeat(1000))]);
        let out = dir.path().join("out");
        let input = dir.path().join("text");
        let report = run(&PackOptions { val_frac: 0.1, ..options(&[&input], &out) }).unwrap();
        assert_eq!(report.divided, Some(input.display().to_string()));
        assert_eq!(report.val, Some(SplitReport { documents: 1, bytes: 1000, shards: 1 }));
        assert_eq!(bytes(&out.join("train")).len(), 9000);
        assert_eq!(bytes(&out.join("val")), "0123456789".repeat(100).as_bytes());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn shards_hold_every_document_and_come_out_alike(
            documents in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..20),
            shard_size in 4u64..400,
            separator: Option<u8>,
            val_frac in 0.0f64..0.5,
        ) {
            let dir = tempdir().unwrap();
            let input = dir.path().join("in");
            fs::create_dir(&input).unwrap();
            for (index, document) in documents.iter().enumerate() {
                fs::write(input.join(format!("{index:03}")), document).unwrap();
            }
            let outs = ["one", "two"].map(|name| dir.path().join(name));
            let reports = outs.each_ref().map(|out| {
                run(&PackOptions { shard_size, separator, val_frac, ..options(&[&input], out) }).unwrap()
            });
            prop_assert_eq!(&reports[0], &reports[1]);

            let sizes: Vec<u64> = documents.iter().map(|document| document.len() as u64).collect();
            let plan = split(&sizes, val_frac);
            for (name, pieces, report) in
                [("train", &plan.train, Some(&reports[0].train)), ("val", &plan.val, reports[0].val.as_ref())]
            {
                prop_assert_eq!(report.is_none(), pieces.is_empty());
                let Some(report) = report else { continue };
                let parts: Vec<_> =
                    pieces.iter().map(|p| &documents[p.document][p.start as usize..p.end as usize]).collect();
                let joined = parts.join(separator.as_slice());
                prop_assert_eq!(&bytes(&outs[0].join(name)), &joined);
                let shards = names(&outs[0].join(name));
                let counted =
                    SplitReport { documents: parts.len() as u64, bytes: joined.len() as u64, shards: shards.len() as u64 };
                prop_assert_eq!(report, &counted);
                for shard in shards {
                    let [one, two] = outs.each_ref().map(|out| fs::read(out.join(name).join(&shard)).unwrap());
                    prop_assert_eq!(one, two);
                }
            }
        }
    }
}

//! Makes shards from files: what `bbt pack` does.
//!
//! ```text
//! OUT/train/shard_00000.bin, shard_00001.bin, ...
//! OUT/val/shard_00000.bin, ...                     where there is validation data
//! OUT/manifest.json                                the report: what separates the documents, and the totals
//! ```
//!
//! A document is a file with at least one byte. The shards of a split, one after another, are its documents
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
    /// file nor directory are passed over; so are the output directory, and files found before.
    pub inputs: Vec<PathBuf>,
    /// The directory to make.
    pub out: PathBuf,
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
    path: PathBuf,
    size: u64,
}

/// Packs files into shards. `progress` is told the bytes of documents done and in all; `Break` ends it.
///
/// The output is written to a hidden directory beside `out`, synced, and renamed: `out` is whole or not there.
/// What fails or is interrupted leaves nothing; what is killed leaves the hidden directory (`.OUT.*`), which
/// can be deleted. When `out` is replaced, a kill between the two renames leaves the old and the new one there.
///
/// # Errors
/// Options out of range; an output that exists (see [`PackOptions::allow_overwrite`]) or cannot be written; an
/// input that is missing or unreadable, or changes meanwhile; inputs without data; `Break` from `progress`.
pub fn pack(
    options: &PackOptions,
    mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<PackReport, DataError> {
    let out = Output::check(options)?;
    let documents = find(options)?;
    let sizes: Vec<u64> = documents.iter().map(|document| document.size).collect();
    let plan = split(&sizes, options.val_frac);

    let staging = out.staging()?;
    let new = staging.path().join("new");
    create_dir(&new)?;
    let (mut done, total) = (0, sizes.iter().sum());
    let mut read = |bytes: u64| {
        done += bytes;
        match progress(done, total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(DataError::Interrupted),
        }
    };
    let mut write = |name, pieces: &[Piece]| write_split(&new.join(name), options, &documents, pieces, &mut read);
    let report = PackReport {
        separator: options.separator,
        train: write("train", &plan.train)?,
        val: if plan.val.is_empty() { None } else { Some(write("val", &plan.val)?) },
        divided: plan.divided.map(|document| documents[document].path.display().to_string()),
    };
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
        let path = &options.out;
        let Some(name) = path.file_name() else {
            let message = format!("`{}` does not name a new directory", path.display());
            return Err(DataError::invalid("out", message));
        };
        if fs::symlink_metadata(path).is_ok() {
            if !options.allow_overwrite {
                return Err(DataError::Exists { path: path.into() });
            }
            // The directory is about to be deleted: a mistyped name must not cost more than an earlier output.
            let manifest = fs::read(path.join(MANIFEST)).unwrap_or_default();
            if path.is_symlink() || serde_json::from_slice::<PackReport>(&manifest).is_err() {
                return Err(DataError::NotPacked { path: path.into() });
            }
        }
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.into(),
            _ => PathBuf::from("."),
        };
        Ok(Self { path, parent, name: name.to_string_lossy().into_owned() })
    }

    /// A directory beside the output, deleted when dropped.
    fn staging(&self) -> Result<tempfile::TempDir, DataError> {
        fs::create_dir_all(&self.parent).map_err(DataError::io("create", &self.parent))?;
        let prefix = format!(".{}.", self.name);
        tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(&self.parent)
            .map_err(DataError::io("write to", &self.parent))
    }

    /// Puts `new` in the output's place; what was there goes to `staging`.
    fn replace(&self, staging: &Path, new: &Path) -> Result<(), DataError> {
        let old = staging.join("old");
        let replaces = self.path.exists();
        if replaces {
            fs::rename(self.path, &old).map_err(DataError::io("replace", self.path))?;
        }
        if let Err(error) = fs::rename(new, self.path) {
            if replaces {
                fs::rename(&old, self.path).map_err(DataError::io("put back", self.path))?;
            }
            return Err(DataError::io("create", self.path)(error));
        }
        sync_dir(&self.parent)
    }
}

/// The documents, in order.
fn find(options: &PackOptions) -> Result<Vec<Document>, DataError> {
    let wanted = |path: &Path| {
        let extension = path.extension().unwrap_or_default();
        let mut wanted = options.extensions.iter();
        options.extensions.is_empty() || wanted.any(|e| extension.eq_ignore_ascii_case(e.trim_start_matches('.')))
    };
    let mut documents = Vec::new();
    let mut seen = HashSet::new();
    for input in &options.inputs {
        let metadata = match fs::metadata(input) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(DataError::Missing { path: input.clone() });
            }
            Err(error) => return Err(DataError::io("read", input)(error)),
        };
        let files = if metadata.is_dir() { files_in(input, &options.out)? } else { vec![input.clone()] };
        for path in files.into_iter().filter(|path| wanted(path)) {
            let metadata = fs::metadata(&path).map_err(DataError::io("read", &path))?;
            let real = fs::canonicalize(&path).map_err(DataError::io("read", &path))?;
            if metadata.is_file() && metadata.len() > 0 && seen.insert(real) {
                documents.push(Document { path, size: metadata.len() });
            } else if !metadata.is_file() && path == *input {
                let error = io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a directory");
                return Err(DataError::io("pack", &path)(error));
            }
        }
    }
    if documents.is_empty() {
        let inputs: Vec<String> = options.inputs.iter().map(|input| input.display().to_string()).collect();
        let filter = match options.extensions.as_slice() {
            [] => String::new(),
            extensions => format!(" and one of the extensions {}", extensions.join(", ")),
        };
        return Err(DataError::NoDocuments { inputs: inputs.join(", "), filter });
    }
    Ok(documents)
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

/// Writes one split's shards to the new directory `dir`. `read` is told the bytes of each read.
fn write_split(
    dir: &Path,
    options: &PackOptions,
    documents: &[Document],
    pieces: &[Piece],
    read: &mut impl FnMut(u64) -> Result<(), DataError>,
) -> Result<SplitReport, DataError> {
    create_dir(dir)?;
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
        let Document { path, size } = &documents[piece.document];
        let mut file = File::open(path).map_err(DataError::io("open", path))?;
        let now = file.metadata().map_err(DataError::io("read", path))?.len();
        file.seek(SeekFrom::Start(piece.start)).map_err(DataError::io("read", path))?;
        let mut left = piece.len();
        while left > 0 {
            let wanted = left.min(BUFFER as u64) as usize;
            let count = file.read(&mut buffer[..wanted]).map_err(DataError::io("read", path))?;
            if count == 0 || now != *size {
                return Err(DataError::Changed { path: path.clone() });
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
        let path = self.dir.join(format!("shard_{:05}.bin", self.begun));
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
        assert_eq!(report, PackReport { separator: Some(b'|'), train, val: None, divided: None });
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
        symlink(dir.path().join("nowhere"), input.join("dangling")).unwrap();
        let message = run(&options(&[&input], &dir.path().join("out2"))).unwrap_err();
        assert!(message.starts_with(input.join("dangling").to_str().unwrap()), "{message}");
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

//! The errors of a configuration.

use std::path::PathBuf;

use super::YamlError;

/// A configuration that cannot be used; says where it stands and what would do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The YAML file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not the YAML that a configuration is made of.
    #[error("{}: {source}\n  `bbt config` prints every key with its default", path.display())]
    Yaml {
        /// The YAML file.
        path: PathBuf,
        /// What is wrong, and in which line.
        source: YamlError,
    },
    /// A flag does not fit its key.
    #[error("{flag}: {message}")]
    Flag {
        /// As the user wrote it.
        flag: String,
        /// What is wrong with it.
        message: String,
    },
    /// A key has a value outside its range, or one that contradicts another.
    #[error("{key}: {message}")]
    Invalid {
        /// The key, as `section.key`.
        key: String,
        /// What would do.
        message: String,
    },
}

pub(super) fn invalid(key: &str, message: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key: key.into(), message: message.into() }
}

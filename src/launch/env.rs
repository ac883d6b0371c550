//! What a launcher tells a process of its place among the others, in the environment variables of torchrun
//! (<https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables>).

use std::str::FromStr;

/// The place of this process among those that train together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankEnv {
    /// Number of this process, from 0: `RANK`.
    pub rank: usize,
    /// Its number on this machine, and so the number of its GPU: `LOCAL_RANK`, 0 where that is missing.
    pub local_rank: usize,
    /// Number of processes in all: `WORLD_SIZE`.
    pub world_size: usize,
    /// Number of them on this machine: `LOCAL_WORLD_SIZE`, 1 where that is missing.
    pub local_world_size: usize,
    /// Where the store is: `MASTER_ADDR`.
    pub master_addr: String,
    /// Its port: `MASTER_PORT`.
    pub master_port: u16,
    /// Whether the launcher holds the store (`TORCHELASTIC_USE_AGENT_STORE`); else rank 0 does.
    pub agent_store: bool,
    /// How often the launcher has restarted the run: `TORCHELASTIC_RESTART_COUNT`.
    pub restart_count: u64,
}

/// Variables that make no sense.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum EnvError {
    /// One is missing.
    #[error(
        "{0} is not set: --ddp needs torchrun's variables; start with `torchrun --no-python … bbt train …` or `bbt launch … -- train …`"
    )]
    Missing(&'static str),
    /// One has a value that it cannot have.
    #[error("{name}={value}: {expected}")]
    Malformed {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: String,
    },
}

impl RankEnv {
    /// This process's place, from its environment. Without `required`: none where no launcher has set both
    /// `RANK` and `WORLD_SIZE`.
    ///
    /// # Errors
    /// A variable that is missing or malformed.
    pub fn from_env(required: bool) -> Result<Option<Self>, EnvError> {
        let lookup = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        if !required && (lookup("RANK").is_none() || lookup("WORLD_SIZE").is_none()) {
            return Ok(None);
        }
        Self::read(lookup).map(Some)
    }

    /// The same from any source of variables.
    ///
    /// # Errors
    /// As [`RankEnv::from_env`].
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, EnvError> {
        let world_size: usize = number(&lookup, "WORLD_SIZE", None)?;
        if world_size == 0 {
            return Err(malformed("WORLD_SIZE", "0", "at least one process trains"));
        }
        let rank = below(&lookup, "RANK", None, world_size, "WORLD_SIZE")?;
        let local_world_size = number(&lookup, "LOCAL_WORLD_SIZE", Some(1))?;
        let local_rank = match lookup("LOCAL_WORLD_SIZE") {
            Some(_) => below(&lookup, "LOCAL_RANK", None, local_world_size, "LOCAL_WORLD_SIZE")?,
            None => below(&lookup, "LOCAL_RANK", Some(0), world_size, "WORLD_SIZE")?,
        };
        let master_addr = lookup("MASTER_ADDR").ok_or(EnvError::Missing("MASTER_ADDR"))?;
        if master_addr.trim().is_empty() {
            return Err(malformed("MASTER_ADDR", &master_addr, "must be the name or address of rank 0's machine"));
        }
        let master_port = number(&lookup, "MASTER_PORT", None)?;
        if master_port == 0 {
            return Err(malformed("MASTER_PORT", "0", "must be a port that every rank can know, from 1 to 65535"));
        }
        Ok(Self {
            rank,
            local_rank,
            world_size,
            local_world_size,
            master_addr,
            master_port,
            // torchrun writes Python's True.
            agent_store: lookup("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v.eq_ignore_ascii_case("true")),
            restart_count: number(&lookup, "TORCHELASTIC_RESTART_COUNT", Some(0))?,
        })
    }
}

fn malformed(name: &'static str, value: &str, expected: impl Into<String>) -> EnvError {
    EnvError::Malformed { name, value: value.into(), expected: expected.into() }
}

fn number<T: FromStr>(
    lookup: &impl Fn(&str) -> Option<String>,
    name: &'static str,
    default: Option<T>,
) -> Result<T, EnvError> {
    match (lookup(name), default) {
        (Some(value), _) => value.trim().parse().map_err(|_| {
            let largest = if size_of::<T>() == 2 { " up to 65535" } else { "" };
            malformed(name, &value, format!("must be a whole number{largest}"))
        }),
        (None, Some(default)) => Ok(default),
        (None, None) => Err(EnvError::Missing(name)),
    }
}

fn below(
    lookup: &impl Fn(&str) -> Option<String>,
    name: &'static str,
    default: Option<usize>,
    end: usize,
    end_name: &str,
) -> Result<usize, EnvError> {
    let value = number(lookup, name, default)?;
    if value >= end {
        return Err(malformed(name, &value.to_string(), format!("ranks count from 0 and stay below {end_name}={end}")));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: [(&str, &str); 8] = [
        ("RANK", "3"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ("TORCHELASTIC_RESTART_COUNT", "2"),
    ];

    /// Reads WHOLE with some variables replaced, or taken out.
    fn read(changes: &[(&str, Option<&str>)]) -> Result<RankEnv, EnvError> {
        RankEnv::read(|name| match changes.iter().find(|(n, _)| *n == name) {
            Some((_, value)) => value.map(String::from),
            None => WHOLE.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()),
        })
    }

    #[test]
    fn torchruns_variables_are_read() {
        let env = read(&[]).unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size), (3, 1, 4, 2));
        assert_eq!((env.master_addr.as_str(), env.master_port), ("node0", 29500));
        assert_eq!((env.agent_store, env.restart_count), (true, 2));
        let bare = read(&[("LOCAL_RANK", None), ("LOCAL_WORLD_SIZE", None), ("TORCHELASTIC_USE_AGENT_STORE", None)]);
        let bare = bare.unwrap();
        assert_eq!((bare.local_rank, bare.local_world_size, bare.agent_store), (0, 1, false));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for name in ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
            let error = read(&[(name, None)]).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{name} is not set")), "{error}");
        }
        for (name, value) in [
            ("RANK", "4"),
            ("RANK", "-1"),
            ("RANK", ""),
            ("LOCAL_RANK", "2"),
            ("WORLD_SIZE", "0"),
            ("WORLD_SIZE", "two"),
            ("MASTER_ADDR", " "),
            ("MASTER_PORT", "0"),
            ("MASTER_PORT", "65536"),
            ("TORCHELASTIC_RESTART_COUNT", "x"),
        ] {
            let error = read(&[(name, Some(value))]).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{name}={value}: ")), "{error}");
        }
    }
}

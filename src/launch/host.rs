//! Whether a host's name is known.

use std::io;
use std::net::ToSocketAddrs;
use std::thread;
use std::time::{Duration, Instant};

/// Waits up to `patience` until `host` (a name or an address) resolves. A name may become known while a cluster is
/// still starting; what stays unknown is soon told, and not only after the time that ranks have to come.
///
/// # Errors
/// The resolver's last word.
pub fn resolve(host: &str, patience: Duration) -> io::Result<()> {
    let began = Instant::now();
    loop {
        match (host, 0).to_socket_addrs() {
            Ok(_) => return Ok(()),
            Err(error) if began.elapsed() >= patience => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(500).min(patience)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_resolve_and_what_nobody_knows_does_not() {
        for host in ["127.0.0.1", "::1", "localhost"] {
            resolve(host, Duration::ZERO).unwrap_or_else(|error| panic!("{host}: {error}"));
        }
        // RFC 6761: no such name ever exists.
        assert!(resolve("no-such-host.invalid", Duration::ZERO).is_err());
    }
}

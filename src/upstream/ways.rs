//! Connections that are this process's own, by both their ends: a packet filter may lead one back to it.

use std::net::SocketAddr;
use std::sync::Arc;

use dashmap::DashSet;

/// From where to where: no other connection of a network has both.
type Ends = (SocketAddr, SocketAddr);

/// The connections that are open. A clone knows the same ones.
#[derive(Clone, Default)]
pub struct Ways {
    open: Arc<DashSet<Ends>>,
}

/// A connection that is open, as long as this is kept.
pub struct Way {
    ways: Ways,
    ends: Ends,
}

impl Ways {
    /// Notes one end of a connection; nothing, where the other end is noted too, and so its own.
    ///
    /// Both ends come here, each when it is known, and the second finds the first.
    pub fn enter(&self, from: SocketAddr, to: SocketAddr) -> Option<Way> {
        let ends = (canonical(from), canonical(to));
        self.open.insert(ends).then(|| Way { ways: self.clone(), ends })
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.ways.open.remove(&self.ends);
    }
}

/// As either end sees it: neither scope nor spelling.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_its_own_while_both_of_its_ends_are_here() {
        // CLR-004
        let ways = Ways::default();
        let at = |text: &str| text.parse().unwrap();
        let here = ways.enter(at("192.0.2.1:40000"), at("192.0.2.2:443")).unwrap();
        // Another connection has another end, if only one.
        let _other = ways.enter(at("192.0.2.1:40000"), at("192.0.2.3:443")).unwrap();
        assert!(ways.enter(at("[::ffff:192.0.2.1]:40000"), at("192.0.2.2:443")).is_none());
        drop(here);
        assert!(ways.enter(at("192.0.2.1:40000"), at("192.0.2.2:443")).is_some());
    }
}

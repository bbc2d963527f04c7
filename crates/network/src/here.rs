//! What words of rules stand for on this host, for those who keep rules elsewhere than in its kernel.

use ipnet::IpNet;

use crate::Error;
use crate::kernel::{Kernel, OUR_GROUP};

/// Addresses of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Here {
    /// What `host` stands for: whatever this host takes for itself, on any interface, its loopback included.
    pub host: Vec<IpNet>,
    /// The networks of guests that have addresses on this host.
    pub guests: Vec<IpNet>,
}

impl Here {
    /// Asks the kernel, which needs no rights. It holds for now: a later address is not in it.
    ///
    /// # Errors
    /// [`Error::Kernel`] if it does not say.
    pub fn ask() -> Result<Self, Error> {
        let mut kernel = Kernel::open()?;
        let host = IpNet::aggregate(&kernel.local_addresses()?);
        let links = kernel.look()?.links;
        let ours = links.values().filter(|link| link.group == OUR_GROUP);
        let guests: Vec<IpNet> = ours
            .flat_map(|link| link.addresses.iter().map(IpNet::trunc))
            .collect();
        Ok(Self {
            host,
            guests: IpNet::aggregate(&guests),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_itself() {
        let here = Here::ask().unwrap();
        for own in ["127.0.0.1", "127.1.2.3"] {
            let own: std::net::IpAddr = own.parse().unwrap();
            assert!(here.host.iter().any(|net| net.contains(&own)), "{here:?}");
        }
        // The address from which the world is reached, where there is one.
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("192.0.2.1:9").is_ok() {
            let own = socket.local_addr().unwrap().ip();
            assert!(here.host.iter().any(|net| net.contains(&own)), "{here:?}");
            let world: std::net::IpAddr = "192.0.2.1".parse().unwrap();
            assert!(own == world || !here.host.iter().any(|net| net.contains(&world)));
        }
    }
}

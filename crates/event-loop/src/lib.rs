//! One epoll thread that hosts workers.

// A control plane made of go-control-plane's snapshot cache and server, for tests. It prints the port that it listens at; each line that it reads is a
// snapshot: {"version": "1", "resources": [{"@type": ..., ...}, ...]}, which it serves to every node from then on, and answers with the version.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
)

type snapshot struct {
	Version   string            `json:"version"`
	Resources []json.RawMessage `json:"resources"`
}

// everybody gets the same snapshot.
type everybody struct{}

func (everybody) ID(*core.Node) string { return "all" }

func parse(line []byte) (*cache.Snapshot, error) {
	var read snapshot
	if err := json.Unmarshal(line, &read); err != nil {
		return nil, err
	}
	found := map[resource.Type][]types.Resource{}
	for _, one := range read.Resources {
		packed := &anypb.Any{}
		if err := protojson.Unmarshal(one, packed); err != nil {
			return nil, err
		}
		message, err := packed.UnmarshalNew()
		if err != nil {
			return nil, err
		}
		found[packed.GetTypeUrl()] = append(found[packed.GetTypeUrl()], message)
	}
	return cache.NewSnapshot(read.Version, found)
}

func main() {
	ctx := context.Background()
	snapshots := cache.NewSnapshotCache(true, everybody{}, nil)
	served := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(served, server.NewServer(ctx, snapshots, nil))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	go func() {
		lines := bufio.NewScanner(os.Stdin)
		lines.Buffer(nil, 16<<20)
		for lines.Scan() {
			next, err := parse(lines.Bytes())
			if err == nil {
				err = snapshots.SetSnapshot(ctx, "all", next)
			}
			if err != nil {
				fmt.Println("error:", err)
			} else {
				fmt.Println(next.GetVersion(resource.ClusterType))
			}
		}
		os.Exit(0)
	}()
	if err := served.Serve(listener); err != nil {
		panic(err)
	}
}
